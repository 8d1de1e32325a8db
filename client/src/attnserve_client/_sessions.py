"""KV sessions: keys and values that stay in the server from step to step."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from attnserve_proto import attention_pb2 as pb

from attnserve_client._flows import awaited, blocking
from attnserve_client._session_flows import SessionFlows
from attnserve_client._session_groups import GroupFlows
from attnserve_client._session_state import Connection, SessionState
from attnserve_client._session_steps import BatchFlows
from attnserve_client._sharded_flows import ShardedFlows


class _Session(SessionState):
    """What both kinds of sessions are made of."""

    def __init__(
        self, connection: Connection, state: pb.SessionState, model: str, num_layers: int
    ) -> None:
        super().__init__(connection, state, model, num_layers)
        self._runner = connection.runner
        self._flows = SessionFlows(self, self._like)

    def _like(self, state: pb.SessionState) -> Self:
        return type(self)(self._connection, state, self.model, self.num_layers)


class Session(_Session):
    """One KV session; `client.session` opens it. Closed by `close`, or at the end of a `with`.

    Not to be used by several threads at once.

    >>> with client.session("llama-core", num_layers=32, max_tokens=4096) as session:
    ...     for layer in range(32):
    ...         result = session.attend(layer, query, key, value)

    Attributes:
        id: cannot be guessed; whoever knows it (and is the same caller) may use the session.
        model, num_layers: as opened.
        length: tokens that it holds.
        max_tokens, reserved_tokens: what it may grow to, and what it was promised.
        lease: seconds that the server keeps it after its last use.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    attend = blocking(SessionFlows.attend)
    send_query = blocking(SessionFlows.send_query)
    attend_sent = blocking(SessionFlows.attend_sent)
    abandon = blocking(SessionFlows.abandon)
    commit = blocking(SessionFlows.commit)
    truncate = blocking(SessionFlows.truncate)
    fork = blocking(SessionFlows["Session"].fork)
    renew = blocking(SessionFlows.renew)
    close = blocking(SessionFlows.close)


class AsyncSession(_Session):
    """One KV session of an `AsyncAttentionClient`: `Session`, awaited; use it in `async with`.

    Not to be used by several tasks at once. If a task is cancelled in a step, `abandon` gives that
    step up.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    attend = awaited(SessionFlows.attend)
    send_query = awaited(SessionFlows.send_query)
    attend_sent = awaited(SessionFlows.attend_sent)
    abandon = awaited(SessionFlows.abandon)
    commit = awaited(SessionFlows.commit)
    truncate = awaited(SessionFlows.truncate)
    fork = awaited(SessionFlows["AsyncSession"].fork)
    renew = awaited(SessionFlows.renew)
    close = awaited(SessionFlows.close)


class _Sharded(SessionState):
    """What both kinds of sessions over several servers are made of."""

    _sharded = True

    def __init__(self, runner: Any, flows: ShardedFlows[Any], model: str, num_layers: int) -> None:
        self._runner = runner
        self._flows: Any = flows
        self._parts: list[SessionState] = [part.session for part in flows.parts]
        self.id = ",".join(part.id for part in self._parts)
        self.model = model
        self.num_layers = num_layers
        self.max_tokens = min(part.max_tokens for part in self._parts)
        self.reserved_tokens = min(part.reserved_tokens for part in self._parts)
        self.lease = min(part.lease for part in self._parts)

    @property
    def length(self) -> int:  # type: ignore[override]
        """Tokens that it holds."""
        length: int = self._flows.length
        return length


class ShardedSession(_Sharded, Session):
    """A `Session` over several servers."""


class ShardedAsyncSession(_Sharded, AsyncSession):
    """An `AsyncSession` over several servers."""


class _Batch:
    """What both kinds of batches are made of."""

    def __init__(self, runner: Any, sessions: Sequence[SessionState]) -> None:
        self._runner = runner
        self._flows = GroupFlows(sessions)


class Batch(_Batch):
    """Steps of several sessions together; `client.batch` makes it.

    A step adds tokens to each session: it begins with layer 0, and ends once every layer has been
    computed. Not to be used by several threads at once; different batches may.

    >>> with client.batch([first, second]) as batch:
    ...     for layer in range(num_layers):
    ...         result = batch.attend(layer, [q1, q2], [k1, k2], [v1, v2])
    ...         x1, x2 = result.outputs
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Abandons a step that has not ended; the sessions live on."""
        self.abandon()

    attend = blocking(BatchFlows.attend)
    send_query = blocking(BatchFlows.send_query)
    attend_sent = blocking(BatchFlows.attend_sent)
    abandon = blocking(BatchFlows.abandon)


class AsyncBatch(_Batch):
    """Steps of several sessions of an `AsyncAttentionClient`: `Batch`, awaited."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Abandons a step that has not ended; the sessions live on."""
        await self.abandon()

    attend = awaited(BatchFlows.attend)
    send_query = awaited(BatchFlows.send_query)
    attend_sent = awaited(BatchFlows.attend_sent)
    abandon = awaited(BatchFlows.abandon)
