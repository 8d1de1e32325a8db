"""Steps that several servers take together: all of them, or none."""

from collections.abc import Sequence
from typing import TypeVar

from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Flow
from attnserve_client._results import LayerResult
from attnserve_client._session_steps import BatchFlows
from attnserve_client._together import together

T = TypeVar("T")


def all_or_none(
    calls: Sequence[Flow[T]], batches: Sequence[BatchFlows], before: Sequence[Sequence[int]]
) -> Flow[list[T]]:
    """What calls give, each of one batch's step; they are made at the same time.

    If some fail and others do not, the step is given up in all batches, also where it has ended.

    Args:
        before: of each batch, what each of its sessions held before the step.

    Raises:
        Exception: what the first of those that failed raised.
    """
    outcomes = yield from together(calls)
    for batch, outcome in zip(batches, outcomes, strict=True):
        if isinstance(outcome, AttnserveError) and len(batches) > 1:
            outcome.of_server(batch.server)
    failures = [each for each in outcomes if isinstance(each, Exception)]
    if failures:
        alike = len({batch.in_step for batch in batches}) == 1
        if len(failures) < len(outcomes) or not alike:
            yield from _give_up(batches, outcomes, before, failures[0])
        raise failures[0]
    return [each for each in outcomes if not isinstance(each, Exception)]


def _give_up(
    batches: Sequence[BatchFlows],
    outcomes: Sequence[T | Exception],
    before: Sequence[Sequence[int]],
    failure: Exception,
) -> Flow[None]:
    for batch, outcome, lengths in zip(batches, outcomes, before, strict=True):
        try:
            if not (isinstance(outcome, LayerResult) and outcome.step_ended):
                yield from batch.abandon()
            elif batch.adds:
                for session, length in zip(batch.sessions, lengths, strict=True):
                    yield from session._forgetting(length)
        except AttnserveError as error:
            failure.add_note(f"the step could not be given up at all servers: {error}")
