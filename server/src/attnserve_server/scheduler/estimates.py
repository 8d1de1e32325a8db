"""How long jobs take, learned from those that ran."""

from collections import OrderedDict
from collections.abc import Hashable

# The weight of the newest observation in the running mean.
_NEWEST = 0.2

# Kinds remembered; the longest unseen is forgotten first.
_MOST_KINDS = 1024


class Estimates:
    """Running means of the seconds that one sequence of each kind takes.

    Not safe to share between threads without a lock.
    """

    def __init__(self) -> None:
        self._seconds: OrderedDict[Hashable, float] = OrderedDict()

    def seconds(self, kind: Hashable, sequences: int) -> float:
        """What so many sequences of a kind will take; 0 for a kind never seen."""
        return self._seconds.get(kind, 0.0) * sequences

    def observe(self, kind: Hashable, sequences: int, seconds: float) -> None:
        """So many sequences of a kind took so long."""
        newest = seconds / sequences
        known = self._seconds.pop(kind, newest)
        self._seconds[kind] = known + _NEWEST * (newest - known)
        if len(self._seconds) > _MOST_KINDS:
            self._seconds.popitem(last=False)
