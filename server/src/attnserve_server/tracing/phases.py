"""What the times of a record say: its phases, one after another."""

from collections.abc import Iterator, Sequence
from enum import IntEnum


class Mark(IntEnum):
    """Places of times in a record, in their order; dataplane/native/tracing/recorder.h."""

    ARRIVED = 0
    ADMITTED = 1
    RECEIVED = 2
    TAKEN = 3
    CHECKED = 4
    GATHERED = 5
    STARTED = 6
    ENDED = 7
    FINISHED = 8


# What ends with each.
_PHASES = {
    Mark.ADMITTED: "admission",
    Mark.RECEIVED: "receive",
    Mark.TAKEN: "wait",
    Mark.CHECKED: "check",
    Mark.GATHERED: "queue",
    Mark.STARTED: "batch",
    Mark.ENDED: "compute",
}
# What a call was in whose end came after this mark and before the next.
_CUT_SHORT = {
    Mark.ARRIVED: "admission",
    Mark.ADMITTED: "receive",
    Mark.RECEIVED: "check",
    Mark.TAKEN: "handle",
    Mark.CHECKED: "queue",
    Mark.GATHERED: "batch",
    Mark.STARTED: "compute",
    Mark.ENDED: "answer",
}
_OF_TOKENS = ("AttendTokens", "ModelInfer", "ModelStreamInfer")


def phases(marks: Sequence[int], method: str) -> Iterator[tuple[str, int, int]]:
    """The name, start and end of each phase.

    Args:
        marks: times of a record, 0 where it did not come so far.
        method: whose request it was. Where the control plane checks one of a token model, it makes
            ids of its texts.
    """
    last, since = Mark.ARRIVED, marks[Mark.ARRIVED]
    taken = marks[Mark.TAKEN] > 0
    tokens = taken and method.endswith(_OF_TOKENS)
    for mark, name in _PHASES.items():
        time = marks[mark]
        if time < since or time == 0:
            continue  # heads of a request may run before its last chunk is there
        yield "tokenize" if tokens and mark == Mark.CHECKED else name, since, time
        last, since = mark, time
    name = _CUT_SHORT[last]
    if tokens and last == Mark.TAKEN:
        name = "tokenize"
    yield name, since, max(since, marks[Mark.FINISHED])
