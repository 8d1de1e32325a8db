"""What can be done with one KV session, whoever waits for it."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _arguments as arguments
from attnserve_client import _errors
from attnserve_client._flows import Flow
from attnserve_client._results import LayerResult
from attnserve_client._session_messages import MOST_TOKENS
from attnserve_client._session_state import SessionState
from attnserve_client._session_steps import BatchFlows

S = TypeVar("S", bound=SessionState)

# Why a session need not, or cannot, be closed: it has expired; or nobody can be told, and its lease
# will end it.
_GONE = (
    _errors.NotFoundError,
    _errors.CancelledError,
    _errors.UnavailableError,
    _errors.DeadlineExceededError,
)


class SessionFlows(Generic[S]):
    """The calls of one session.

    Args:
        session: what is known of it.
        make: another session like it, of this state.

    Attributes:
        alone: its steps.
        session: as given.
    """

    def __init__(self, session: S, make: Callable[[pb.SessionState], S]) -> None:
        self.session = self._session = session
        self._make = make
        self._ask = session._asking
        self._closed = False
        self.alone = BatchFlows([session])

    def attend(
        self,
        layer: int,
        query: Any = None,
        key: Any = None,
        value: Any = None,
        *,
        hidden_states: Any = None,
        parents: Sequence[int] | None = None,
        cross_tokens: int = 0,
        prefix_hashes: Iterable[bytes] = (),
        return_output: bool = True,
        return_log_sum_exp: bool = False,
        return_entropy: bool = False,
        return_weights: bool = False,
        priority: int = 0,
        queries_only: bool = False,
        timeout: float | None = 60.0,
    ) -> Flow[LayerResult]:
        """Compute one layer of a step, which begins with layer 0 and ends with the last layer.

        Args:
            layer: 0-based; each once in a step.
            query: [T, H, D], of T new tokens.
            key: [T, Hkv, D]; they and `value` join the cache first.
            value: [T, Hkv, Dv]; of a latent layer None.
            hidden_states: of layer models, instead of query, key and value: [T, E].
            parents: with layer 0: a tree of new tokens, the parent of each (-1: the last token
                before the step); then `commit` says which are kept.
            cross_tokens: with layer 0: keys that come with the session's cross layers.
            prefix_hashes: with layer 0: of the pages that are full with this step.
            return_weights: also the attention weights, [T, H, K], as `result.weights[0]`.

        The others, and errors, as those of `Batch.attend`.
        """
        return self.alone.attend(
            layer,
            query,
            key,
            value,
            hidden_states=hidden_states,
            parents=None if parents is None else [parents],
            cross_tokens=cross_tokens,
            prefix_hashes=None if prefix_hashes == () else [prefix_hashes],
            return_output=return_output,
            return_log_sum_exp=return_log_sum_exp,
            return_entropy=return_entropy,
            return_weights_of=(0,) if arguments.flag("return_weights", return_weights) else (),
            priority=priority,
            queries_only=queries_only,
            timeout=timeout,
        )

    def send_query(
        self,
        layer: int,
        query: Any,
        *,
        parents: Sequence[int] | None = None,
        cross_tokens: int = 0,
        prefix_hashes: Iterable[bytes] = (),
        return_output: bool = True,
        return_log_sum_exp: bool = False,
        return_entropy: bool = False,
        return_weights: bool = False,
        priority: int = 0,
        timeout: float | None = 60.0,
    ) -> Flow[None]:
        """Send the queries of a layer while its keys and values are still being computed.

        Arguments as those of `attend`; what it does, and errors, as `Batch.send_query`.
        """
        return self.alone.send_query(
            layer,
            query,
            parents=None if parents is None else [parents],
            cross_tokens=cross_tokens,
            prefix_hashes=None if prefix_hashes == () else [prefix_hashes],
            return_output=return_output,
            return_log_sum_exp=return_log_sum_exp,
            return_entropy=return_entropy,
            return_weights_of=(0,) if arguments.flag("return_weights", return_weights) else (),
            priority=priority,
            timeout=timeout,
        )

    def attend_sent(
        self, layer: int, key: Any, value: Any = None, *, timeout: float | None = 60.0
    ) -> Flow[LayerResult]:
        """Compute a layer whose queries were sent by `send_query`; as `Batch.attend_sent`."""
        return self.alone.attend_sent(layer, key, value, timeout=timeout)

    def abandon(self) -> Flow[None]:
        """Give up the step under way, if there is one: the session holds what it held before."""
        return self.alone.abandon()

    def commit(self, accepted: Sequence[int], *, timeout: float | None = 10.0) -> Flow[None]:
        """End a tree: keep one path of the last step's tokens, from the root on.

        Args:
            accepted: indices among the step's new tokens, each the parent of the next; none
                forgets the whole tree.

        Raises:
            InvalidArgumentError: it is no path of the tree.
            FailedPreconditionError: the last step had no tree.
        """
        kept = arguments.integers("accepted", accepted)

        def commit(session_id: str) -> pb.DecodeRequest:
            return pb.DecodeRequest(commit=pb.CommitTree(session_id=session_id, accepted=kept))

        # Not repeated: once it is done, it cannot be done again.
        answer = yield from self._ask(commit, timeout, again=False)
        self._session._take(answer.session)

    def truncate(self, length: int, *, timeout: float | None = 10.0) -> Flow[None]:
        """Keep the first `length` tokens.

        Raises:
            InvalidArgumentError: it has fewer.
            FailedPreconditionError: a window would lack keys that were given back.
        """
        length = arguments.integer("length", length, 0, arguments.UINT64)

        def truncate(session_id: str) -> pb.DecodeRequest:
            asked = pb.TruncateSession(session_id=session_id, length=length)
            return pb.DecodeRequest(truncate=asked)

        answer = yield from self._ask(truncate, timeout)
        self._session._take(answer.session)

    def fork(
        self,
        at: int | None = None,
        *,
        max_tokens: int = 0,
        reserved_tokens: int = 0,
        lease: float | None = None,
        timeout: float | None = 10.0,
    ) -> Flow[S]:
        """A new session that begins with this one's first `at` tokens, or all; pages are shared.

        Args:
            max_tokens: of the new session; 0: as this one's.
            reserved_tokens: what it is promised; 0: max_tokens.
            lease: as in `AttentionClient.session`.

        Raises:
            ResourceExhaustedError: not so much can be promised.
        """
        asked = pb.ForkSession(
            length=None if at is None else arguments.integer("at", at, 0, MOST_TOKENS),
            max_tokens=arguments.integer("max_tokens", max_tokens, 0, MOST_TOKENS),
            reserved_tokens=arguments.integer("reserved_tokens", reserved_tokens, 0, MOST_TOKENS),
            lease=arguments.microseconds("lease", lease),
        )

        def fork(session_id: str) -> pb.DecodeRequest:
            asked.session_id = session_id
            return pb.DecodeRequest(fork=asked)

        answer = yield from self._ask(fork, timeout)
        return self._make(answer.session)

    def renew(self, *, lease: float | None = None, timeout: float | None = 10.0) -> Flow[None]:
        """Start its lease anew, with another length if one is given, and look at its state.

        Raises:
            NotFoundError: it has expired, or the server was started anew.
        """
        return self._session._renewing(lease, timeout)

    def close(self, *, timeout: float | None = 10.0) -> Flow[None]:
        """Give it up, and what it was promised; no error if it or the server is gone already."""
        timeout = arguments.seconds("timeout", timeout)
        if self._closed:
            return
        self._closed = True
        self._session._connection.held.discard(self._session)

        def close(session_id: str) -> pb.DecodeRequest:
            return pb.DecodeRequest(close=pb.CloseSession(session_id=session_id))

        try:
            with contextlib.suppress(*_GONE):
                yield from self._ask(close, timeout)
        finally:  # where it has been followed to
            self._session._connection.held.discard(self._session)


def page_hashes(ids: Sequence[int], page_tokens: int) -> list[bytes]:
    """What stands for each full page of some tokens, as `prefix_hashes` takes them.

    Args:
        ids: of the tokens.
        page_tokens: `client.server_info().limits.session_page_tokens`.
    """
    page = arguments.integer("page_tokens", page_tokens, 1)
    given = np.asarray(ids)
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size > 0):
        raise arguments.mistyped("ids", ids, "a list of integers")
    tokens = given.astype("<i8")
    ends = range(page, len(tokens) + 1, page)
    return [hashlib.sha256(tokens[end - page : end].tobytes()).digest() for end in ends]
