"""Which request runs when."""

from attnserve_server.scheduler.places import Places, Ticket

__all__ = ["Places", "Ticket"]
