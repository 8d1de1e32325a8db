"""What the sessions of a client have in common, and what is known of each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

from attnserve_proto import attention_pb2 as pb

from attnserve_client import _arguments as arguments
from attnserve_client import _retries
from attnserve_client import _session_messages as messages
from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Call, Flow
from attnserve_client._moves import Moves
from attnserve_client._session_messages import METHOD
from attnserve_client._sharing_flows import SharingFlows
from attnserve_client._transports import Transport

_FORGETTING_SECONDS = 10.0


class Stream(Protocol):
    """One Decode call; `exchange` answers, or in asyncio gives what does when it is awaited."""

    @property
    def failed(self) -> bool:
        """Whether it has failed, and its open steps with it."""

    def new_step(self) -> int:
        """An id for a step."""

    def exchange(
        self, make: Callable[[int], bytes], read: Callable[[bytes], Any], timeout: float | None
    ) -> Any:
        """Send a request, and wait for what answers it."""

    def begin(self, make: Callable[[int], bytes]) -> Any:
        """Send a request, or its first part; gives what the three below know it by."""

    def answer(self, begun: Any, read: Callable[[bytes], Any], timeout: float | None) -> Any:
        """Wait for what answers a request that was begun whole."""

    def finish(
        self,
        begun: Any,
        make: Callable[[int], bytes],
        read: Callable[[bytes], Any],
        timeout: float | None,
    ) -> Any:
        """Send the last part of a request, and wait for what answers it."""

    def drop(self, begun: Any) -> None:
        """Wait for no answer to a request that was begun."""


class Streams(Protocol):
    """The stream of a client, opened when it is needed, and again after it has failed."""

    def get(self) -> Stream:
        """One that can be used, as far as is known."""


@dataclass(frozen=True, slots=True, eq=False)
class Connection:
    """What the sessions of one client share.

    Attributes:
        address: of the server.
        transport: to it.
        moves: where the client's sessions went.
        memory: shared with the server, if any is.
        held: the sessions that are open on it, and the streams.
    """

    address: str
    streams: Streams
    runner: Any
    transport: Transport
    moves: Moves
    memory: SharingFlows | None = None
    held: WeakSet[Any] = field(default_factory=WeakSet)

    def ask(
        self, request: pb.DecodeRequest, timeout: float | None, *, again: bool = True
    ) -> Flow[pb.DecodeResponse]:
        """Send a request, whose id is filled in; `again`: it can be repeated safely."""

        def attempt(left: float | None) -> Flow[pb.DecodeResponse]:
            answer: pb.DecodeResponse = yield self.call(request, left)
            return answer

        tries = _retries.all_again if again else _retries.once
        return (yield from tries(METHOD, attempt, timeout))

    def call(self, request: pb.DecodeRequest, left: float | None) -> Call:
        """One try of a request, answered by a `DecodeResponse`."""
        make = messages.making(request)
        return Call(lambda left: self.streams.get().exchange(make, messages.read, left), left)


class SessionState:
    """What is known here of a session.

    Attributes:
        id: cannot be guessed; whoever knows it (and is the same caller) may use the session.
        model, num_layers: as opened.
        length: tokens that it holds.
        max_tokens, reserved_tokens: what it may grow to, and what it was promised.
        lease: seconds that the server keeps it after its last use.
    """

    # Whether its parts are at several servers; then it has no connection, nor a state.
    _sharded = False

    def __init__(
        self, connection: Connection, state: pb.SessionState, model: str, num_layers: int
    ) -> None:
        self._connection = connection
        self.id = state.session_id
        self.model = model
        self.num_layers = num_layers
        self._take(state)
        connection.held.add(self)

    def _here(self) -> Connection:
        """The connection to its server, as far as is known where that is."""
        while (found := self._connection.moves.take(self.id)) is not None:
            moved, connection = found
            self._connection.held.discard(self)
            connection.held.add(self)
            self._connection = connection
            self.id, self.length = moved.new_session_id, moved.length
        return self._connection

    def _asking(
        self,
        action: Callable[[str], pb.DecodeRequest],
        timeout: float | None,
        *,
        again: bool = True,
    ) -> Flow[pb.DecodeResponse]:
        """Send a request of this session, to wherever it is.

        Args:
            action: the request, without its id, given the session's.
            timeout: seconds; None waits for ever.
            again: it can be repeated safely.
        """

        def attempt(left: float | None) -> Flow[pb.DecodeResponse]:
            while True:
                connection = self._here()
                try:
                    answer: pb.DecodeResponse = yield connection.call(action(self.id), left)
                except AttnserveError as error:
                    if not connection.moves.follows(error):
                        raise
                else:
                    return answer

        tries = _retries.all_again if again else _retries.once
        return (yield from tries(METHOD, attempt, timeout))

    def _take(self, state: pb.SessionState) -> None:
        """What the server says of it."""
        self.length = state.length
        self.max_tokens = state.max_tokens
        self.reserved_tokens = state.reserved_tokens
        self.lease = state.lease / 1e6

    def _renewing(self, lease: float | None, timeout: float | None) -> Flow[None]:
        """Start its lease anew, and take its state."""
        kept = arguments.microseconds("lease", lease)

        def renew(session_id: str) -> pb.DecodeRequest:
            return pb.DecodeRequest(renew=pb.RenewSession(session_id=session_id, lease=kept))

        answer = yield from self._asking(renew, timeout)
        self._take(answer.session)

    def _forgetting(self, length: int) -> Flow[None]:
        """Forget the step that has ended: its tree, if it waits for `commit`, or its tokens."""
        is_tree = self.length == length

        def forget(session_id: str) -> pb.DecodeRequest:
            if is_tree:
                return pb.DecodeRequest(commit=pb.CommitTree(session_id=session_id))
            truncate = pb.TruncateSession(session_id=session_id, length=length)
            return pb.DecodeRequest(truncate=truncate)

        answer = yield from self._asking(forget, _FORGETTING_SECONDS, again=False)
        self._take(answer.session)
