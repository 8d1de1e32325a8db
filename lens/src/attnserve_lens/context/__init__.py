"""What heads give to a fact as the context around it grows: `attnserve-loadtest context`.

text -> measure (asks the server) -> growth -> report, plot
"""
