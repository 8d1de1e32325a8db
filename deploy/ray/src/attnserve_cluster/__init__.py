"""Servers of attnserve on a Ray cluster: placed, started again, scaled, and found by clients.

One actor keeps the cluster (`controller`), one each server (`owner`), which is a child process of
it (`process`). Calls of clients go to the servers themselves; nothing of them passes through Ray.
"""

__version__ = "0.1.0"
