"""KV sessions: keys and values that stay in the server from step to step."""

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _errors
from attnserve_client import _session_messages as messages
from attnserve_client._results import LayerResult
from attnserve_client._session_steps import Batch, Connection


class Session:
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

    def __init__(
        self, connection: Connection, state: pb.SessionState, model: str, num_layers: int
    ) -> None:
        self._connection = connection
        self.id = state.session_id
        self.model = model
        self.num_layers = num_layers
        self._closed = False
        self._take(state)
        self._alone = Batch(connection, [self])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def attend(
        self,
        layer: int,
        query: Any,
        key: Any = None,
        value: Any = None,
        *,
        parents: Sequence[int] | None = None,
        cross_tokens: int = 0,
        prefix_hashes: Iterable[bytes] = (),
        return_output: bool = True,
        return_log_sum_exp: bool = False,
        return_entropy: bool = False,
        priority: int = 0,
        timeout: float | None = 60.0,
    ) -> LayerResult:
        """Compute one layer of a step, which begins with layer 0 and ends with the last layer.

        Args:
            layer: 0-based; each once in a step.
            query: [T, H, D], of T new tokens.
            key: [T, Hkv, D]; they and `value` join the cache first.
            value: [T, Hkv, Dv].
            parents: with layer 0: a tree of new tokens, the parent of each (-1: the last token
                before the step); then `commit` says which are kept.
            cross_tokens: with layer 0: keys that come with the session's cross layers.
            prefix_hashes: with layer 0: of the pages that are full with this step.

        The others, and errors, as those of `Batch.attend`.
        """
        return self._alone.attend(
            layer,
            query,
            key,
            value,
            parents=None if parents is None else [parents],
            cross_tokens=[cross_tokens],
            prefix_hashes=[prefix_hashes],
            return_output=return_output,
            return_log_sum_exp=return_log_sum_exp,
            return_entropy=return_entropy,
            priority=priority,
            timeout=timeout,
        )

    def abandon(self) -> None:
        """Give up the step under way, if there is one: the session holds what it held before."""
        self._alone.abandon()

    def commit(self, accepted: Sequence[int], *, timeout: float | None = 10.0) -> None:
        """End a tree: keep one path of the last step's tokens, from the root on.

        Args:
            accepted: indices among the step's new tokens, each the parent of the next; none
                forgets the whole tree.

        Raises:
            InvalidArgumentError: it is no path of the tree.
            FailedPreconditionError: the last step had no tree.
        """
        commit = pb.CommitTree(session_id=self.id, accepted=accepted)
        # Not repeated: once it is done, it cannot be done again.
        answer = self._connection.streams.call(pb.DecodeRequest(commit=commit), timeout)
        self._take(answer.session)

    def truncate(self, length: int, *, timeout: float | None = 10.0) -> None:
        """Keep the first `length` tokens.

        Raises:
            InvalidArgumentError: it has fewer.
            FailedPreconditionError: a window would lack keys that were given back.
        """
        request = pb.TruncateSession(session_id=self.id, length=length)
        self._take(self._repeat(pb.DecodeRequest(truncate=request), timeout))

    def fork(
        self,
        at: int | None = None,
        *,
        max_tokens: int = 0,
        reserved_tokens: int = 0,
        lease: float | None = None,
        timeout: float | None = 10.0,
    ) -> "Session":
        """A new session that begins with this one's first `at` tokens, or all; pages are shared.

        Args:
            max_tokens: of the new session; 0: as this one's.
            reserved_tokens: what it is promised; 0: max_tokens.
            lease: as in `AttentionClient.session`.

        Raises:
            ResourceExhaustedError: not so much can be promised.
        """
        request = pb.ForkSession(
            session_id=self.id,
            length=at,
            max_tokens=max_tokens,
            reserved_tokens=reserved_tokens,
            lease=messages.microseconds(lease),
        )
        state = self._repeat(pb.DecodeRequest(fork=request), timeout)
        return Session(self._connection, state, self.model, self.num_layers)

    def renew(self, *, lease: float | None = None, timeout: float | None = 10.0) -> None:
        """Start its lease anew, with another length if one is given, and look at its state.

        Raises:
            NotFoundError: it has expired, or the server was started anew.
        """
        request = pb.RenewSession(session_id=self.id, lease=messages.microseconds(lease))
        self._take(self._repeat(pb.DecodeRequest(renew=request), timeout))

    def close(self, *, timeout: float | None = 10.0) -> None:
        """Give it up, and what it was promised; no error if it or the server is gone already."""
        if self._closed:
            return
        self._closed = True
        request = pb.CloseSession(session_id=self.id)
        # It has expired; or nobody can be told, and its lease will end it.
        gone = (
            _errors.NotFoundError,
            _errors.CancelledError,
            _errors.UnavailableError,
            _errors.DeadlineExceededError,
        )
        with contextlib.suppress(*gone):
            self._connection.repeat(pb.DecodeRequest(close=request), timeout)

    def _repeat(self, request: pb.DecodeRequest, timeout: float | None) -> pb.SessionState:
        return self._connection.repeat(request, timeout).session

    def _take(self, state: pb.SessionState) -> None:
        self.length = state.length
        self.max_tokens = state.max_tokens
        self.reserved_tokens = state.reserved_tokens
        self.lease = state.lease / 1e6


def page_hashes(ids: Sequence[int], page_tokens: int) -> list[bytes]:
    """What stands for each full page of some tokens, as `prefix_hashes` takes them.

    Args:
        ids: of the tokens.
        page_tokens: `client.server_info().limits.session_page_tokens`.
    """
    tokens = np.asarray(ids, dtype="<i8")
    ends = range(page_tokens, len(tokens) + 1, page_tokens)
    return [hashlib.sha256(tokens[end - page_tokens : end].tobytes()).digest() for end in ends]
