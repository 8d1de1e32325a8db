"""Load as it comes from outside: at times of its own, whether the server keeps up or not.

arrivals   when requests are due
requests   what they are: one answer, or a session that generates
plan       both together, drawn beforehand from a seed
callers    how one is sent through the SDK, to one of several servers
generator  processes that send what a plan says, and the times that come back
measured   what became of the requests
"""
