"""Which request runs when, and with which others."""

from attnserve_server.scheduler.job import Job, Outcome, Ticket
from attnserve_server.scheduler.scheduler import Scheduler

__all__ = ["Job", "Outcome", "Scheduler", "Ticket"]
