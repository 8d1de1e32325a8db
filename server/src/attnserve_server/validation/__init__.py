"""Every check on a request, before anything is queued."""

from attnserve_server.validation.attend import AttendPlan, complete, plan
from attnserve_server.validation.sizes import offsets
from attnserve_server.validation.tokens import tokens_work

__all__ = ["AttendPlan", "complete", "offsets", "plan", "tokens_work"]
