"""Opening, saving and loading KV sessions, whoever waits for it."""

from collections.abc import Callable
from typing import Generic, TypeVar, Unpack

from attnserve_proto import attention_pb2 as pb

from attnserve_client import _session_messages as messages
from attnserve_client._flows import Flow
from attnserve_client._session_messages import SessionOptions
from attnserve_client._session_state import Connection, SessionState

S = TypeVar("S", bound=SessionState)


class OpeningFlows(Generic[S]):
    """The calls that open sessions.

    Args:
        connection: what they share.
        make: a session of the client.
        patient: whether opening is tried until its time is up; else once.
    """

    def __init__(
        self,
        connection: Connection,
        make: Callable[[Connection, pb.SessionState, str, int], S],
        *,
        patient: bool = True,
    ) -> None:
        self._connection = connection
        self._make = make
        self._patient = patient

    def session(
        self, model: str = "", *, timeout: float | None = 60.0, **options: Unpack[SessionOptions]
    ) -> Flow[S]:
        """Open a KV session: keys and values of its tokens stay in the server. Use it in `with`.

        Args:
            model: a core model with the variant `paged`, or for all layers one layer model.
            timeout: seconds; None waits for ever.
            options: `num_layers`, `max_tokens` and more: see `SessionOptions`.

        Raises:
            ResourceExhaustedError: not so much can be promised.
            FailedPreconditionError: the model keeps no sessions, or not of such layers.
        """
        return (yield from self.sessions(1, model, timeout=timeout, **options))[0]

    def sessions(
        self,
        count: int,
        model: str = "",
        *,
        timeout: float | None = 60.0,
        **options: Unpack[SessionOptions],
    ) -> Flow[list[S]]:
        """Open `count` equal KV sessions, all or none; else as `session`."""
        opening = messages.open_sessions(count, model, **options)
        # Repeated after a lost connection too: what was opened then ends with its lease.
        answer = yield from self._connection.ask(
            pb.DecodeRequest(open=opening), timeout, again=self._patient
        )
        return [
            self._make(self._connection, state, opening.model, opening.num_layers)
            for state in answer.opened.sessions
        ]
