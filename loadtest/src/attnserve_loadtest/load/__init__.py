"""Load as it comes from outside: at times of its own, whether the server keeps up or not.

arrivals   when requests are due
requests   what they are: one answer, or a session that generates
plan       both together, drawn beforehand from a seed
callers    how one is sent through the SDK, to one of several servers
generator  processes that send what a plan says, and the times that come back
record     sends requests and keeps their times
measured   what became of the requests
slo        bounds, and what is good within them
ramp       which loads are tried, and where the curve bends
service    how long a server computes, by length
summary    from what was measured to the steps of a report
run        all of it against servers
trace      recorded traffic
simulation a cluster that is not there
sizing     the same traffic at several sizes of it
beside     a process that sends for a Locust user
source     that user's end of it
"""
