"""Steps of several sessions, wherever they are: they may move from step to step."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Flow
from attnserve_client._results import LayerResult
from attnserve_client._session_splits import SplitBatchFlows, batch_flows
from attnserve_client._session_state import SessionState
from attnserve_client._session_steps import BatchFlows, ScatteredError

T = TypeVar("T")


class GroupFlows:
    """As `BatchFlows`, or as `SplitBatchFlows`: what suits where the sessions are.

    Raises:
        TypeError, ValueError: they are none.
    """

    def __init__(self, sessions: Sequence[SessionState]) -> None:
        self._flows: BatchFlows | SplitBatchFlows = batch_flows(sessions)
        self._sessions = list(sessions)
        self._places = self._places_now()

    def attend(self, layer: int, *args: Any, **options: Any) -> Flow[LayerResult]:
        """As `BatchFlows.attend`."""
        return (yield from self._done(lambda: self._flows.attend(layer, *args, **options)))

    def send_query(self, layer: int, query: Any, **options: Any) -> Flow[None]:
        """As `BatchFlows.send_query`."""
        yield from self._done(lambda: self._flows.send_query(layer, query, **options))

    def attend_sent(self, layer: int, *args: Any, **options: Any) -> Flow[LayerResult]:
        """As `BatchFlows.attend_sent`."""
        return (yield from self._flows.attend_sent(layer, *args, **options))

    def abandon(self) -> Flow[None]:
        """As `BatchFlows.abandon`."""
        return self._flows.abandon()

    def _done(self, call: Callable[[], Flow[T]]) -> Flow[T]:
        """What a call gives; anew if sessions have moved before its step began."""
        while True:
            begins = not self._flows.in_step
            if begins:
                self._group()
            try:
                return (yield from call())
            except ScatteredError:
                continue
            except AttnserveError as error:
                # Nothing was done at the server that said so, and what others did was given up.
                if not begins or error.moved is None or not self._followed(error):
                    raise

    def _followed(self, error: AttnserveError) -> bool:
        return self._sessions[0]._connection.moves.follows(error)

    def _group(self) -> None:
        places = self._places_now()
        if places != self._places:
            self._places = places
            self._flows = batch_flows(self._sessions)

    def _places_now(self) -> list[int]:
        return [id(session._here()) for session in self._sessions]
