"""Steps of KV sessions, of one or of many together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _errors
from attnserve_client import _session_messages as messages
from attnserve_client._errors import AttnserveError
from attnserve_client._results import LayerResult
from attnserve_client._retries import Retries
from attnserve_client._session_messages import METHOD, Rows
from attnserve_client._session_stream import SessionStream, SessionStreams

if TYPE_CHECKING:
    from attnserve_client._sessions import Session

# How long it is asked after a lost connection whether sessions survived, seconds.
_FIND_SECONDS = 30.0
_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


@dataclass(frozen=True, slots=True)
class Connection:
    """What sessions of one client share."""

    streams: SessionStreams
    retries: Retries

    def repeat(self, request: pb.DecodeRequest, timeout: float | None) -> pb.DecodeResponse:
        """Send what can be repeated safely, until it is answered."""
        return self.retries.call(METHOD, lambda left: self.streams.call(request, left), timeout)


@dataclass(slots=True)
class _Step:
    """A step that is under way."""

    stream: SessionStream
    step_id: int
    new_tokens: list[int]
    has_tree: list[bool]
    starts: tuple[int, ...]


class Batch:
    """Steps of several sessions together; `client.batch` makes it.

    A step adds tokens to each session: it begins with layer 0, and ends once every layer has been
    computed. Not to be used by several threads at once; different batches may.

    >>> with client.batch([first, second]) as batch:
    ...     for layer in range(num_layers):
    ...         result = batch.attend(layer, [q1, q2], [k1, k2], [v1, v2])
    ...         x1, x2 = result.outputs
    """

    def __init__(self, connection: Connection, sessions: "Sequence[Session]") -> None:
        if not sessions:
            raise ValueError("sessions: none; allowed: one or more")
        self._connection = connection
        self._sessions = tuple(sessions)
        self._step: _Step | None = None

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

    def attend(
        self,
        layer: int,
        query: Any,
        key: Any = None,
        value: Any = None,
        *,
        new_tokens: Sequence[int] | None = None,
        parents: Sequence[Sequence[int] | None] | None = None,
        cross_tokens: Sequence[int] | None = None,
        prefix_hashes: Sequence[Iterable[bytes]] | None = None,
        return_output: bool = True,
        return_log_sum_exp: bool = False,
        return_entropy: bool = False,
        priority: int = 0,
        timeout: float | None = 60.0,
    ) -> LayerResult:
        """Compute one layer of a step; layer 0 begins the step.

        Args:
            layer: 0-based; each once in a step.
            query: [T, H, D], the new tokens of all sessions one after another; or a list of one
                array for each session. dtype as the model's, as key and value.
            key: [T, Hkv, D], likewise; of a cross layer [C, Hkv, D] in a step with `cross_tokens`,
                else None.
            value: [T, Hkv, Dv], likewise.
            new_tokens: with layer 0 and a packed query: tokens of each session; None: as many of
                each.
            parents: with layer 0: for each session, the parent of each new token (-1: the last one
                before the step), or None where there is no tree.
            cross_tokens: with layer 0: keys that come for each session's cross layers.
            prefix_hashes: with layer 0: for each session, the hashes of the pages that are full
                with this step, so that others may share them.
            return_output: send the output back.
            return_log_sum_exp: also the log-sum-exp of each query's scores.
            return_entropy: also the entropy of each query's weights, nats.
            priority: with layer 0: as in `AttentionClient.attend`.
            timeout: seconds; None waits for ever. After it the step is lost.

        Raises:
            AttnserveError: one subclass per gRPC status. The step is still there, and the layer can
                be sent again; if it says that the connection was lost, the step is not, and the
                message says whether the sessions are.
            TypeError: an argument cannot be read as an array.
            ValueError: tensors of a wrong rank, lengths that do not match, a layer other than 0
                without a step.
        """
        tensors = {"query": messages.rows(query, "query")}
        if key is not None:
            tensors["key"] = messages.rows(key, "key")
        if value is not None:
            tensors["value"] = messages.rows(value, "value")
        head = pb.AttendLayer(
            layer=layer,
            returns=messages.returns(return_output, return_log_sum_exp, return_entropy),
        )
        if self._step is not None:
            return self._next(self._step, head, tensors, timeout)
        if layer != 0:
            raise ValueError(f"layer: {layer} without a step; allowed: 0, which begins one")
        counts = self._lengths(tensors["query"], new_tokens)
        begin = pb.BeginStep(priority=priority)
        for index, session in enumerate(self._sessions):
            begin.sessions.add(
                session_id=session.id,
                new_tokens=counts[index],
                parents=(parents[index] if parents else None) or (),
                cross_tokens=cross_tokens[index] if cross_tokens else 0,
                prefix_hashes=messages.joined_hashes(prefix_hashes[index] if prefix_hashes else ()),
            )
        return self._first(begin, head, tensors, timeout)

    def abandon(self) -> None:
        """Give up the step under way, if there is one: the sessions hold what they held before."""
        step, self._step = self._step, None
        if step is None or not step.stream.alive:
            return
        abandon = pb.DecodeRequest(abandon_step=pb.AbandonStep(step_id=step.step_id))
        try:
            (request_id,) = step.stream.send([partial(_with_id, abandon)])
            step.stream.answer(request_id, _FIND_SECONDS)
        except AttnserveError as error:
            # A stream that ended, and a step of which a session is gone, are abandoned already.
            if error.code not in _LOST | {grpc.StatusCode.NOT_FOUND}:
                raise

    def _lengths(self, query: Rows, new_tokens: Sequence[int] | None) -> list[int]:
        """The new tokens of each session."""
        count = len(self._sessions)
        if new_tokens is None and len(query.parts) == count:
            return query.lengths
        total = query.shape[0]
        lengths = [total // count] * count if new_tokens is None else list(new_tokens)
        if len(lengths) != count or sum(lengths) != total:
            raise ValueError(
                f"new_tokens: {lengths} for {count} sessions and a query of {total} tokens; "
                "allowed: one number for each session, which add up to the query's tokens"
            )
        return lengths

    def _first(
        self,
        begin: pb.BeginStep,
        head: pb.AttendLayer,
        tensors: dict[str, Rows],
        timeout: float | None,
    ) -> LayerResult:
        """Begin a step and compute its first layer, in one go.

        If the connection is lost under it, once more: but only if the sessions are as they were,
        since a step of one layer may have ended just before.
        """
        before = [session.length for session in self._sessions]
        stream = self._connection.streams.get()
        try:
            return self._begin(stream, begin, head, tensors, timeout)
        except AttnserveError as error:
            if not stream.failed:
                raise
            failure = self._after_loss(error)
            if error.code not in _LOST or isinstance(failure, _errors.NotFoundError):
                raise failure from error
            if [session.length for session in self._sessions] != before:
                raise failure from error
        stream = self._connection.streams.get()
        try:
            return self._begin(stream, begin, head, tensors, timeout)
        except AttnserveError as error:
            if not stream.failed:
                raise
            raise self._after_loss(error) from error

    def _begin(
        self,
        stream: SessionStream,
        begin: pb.BeginStep,
        head: pb.AttendLayer,
        tensors: dict[str, Rows],
        timeout: float | None,
    ) -> LayerResult:
        begin.step_id = head.step_id = stream.new_step()
        begun_id, layer_id = stream.send(
            [
                partial(_with_id, pb.DecodeRequest(begin_step=begin)),
                partial(messages.attend_layer, head=head.SerializeToString(), tensors=tensors),
            ]
        )
        try:
            begun = stream.answer(begun_id, timeout).message.begun
        except AttnserveError:
            stream.forget(layer_id)
            raise
        for session, length in zip(self._sessions, begun.lengths, strict=True):
            session.length = length
        counts = [each.new_tokens for each in begin.sessions]
        trees = [bool(each.parents) for each in begin.sessions]
        starts = tuple(accumulate(counts, initial=0))
        self._step = _Step(stream, begin.step_id, counts, trees, starts)
        return self._result(self._step, layer_id, timeout)

    def _next(
        self, step: _Step, head: pb.AttendLayer, tensors: dict[str, Rows], timeout: float | None
    ) -> LayerResult:
        head.step_id = step.step_id
        make = partial(messages.attend_layer, head=head.SerializeToString(), tensors=tensors)
        try:
            (request_id,) = step.stream.send([make])
            return self._result(step, request_id, timeout)
        except AttnserveError as error:
            if not step.stream.failed:
                raise
            raise self._after_loss(error) from error

    def _result(self, step: _Step, request_id: int, timeout: float | None) -> LayerResult:
        answer = step.stream.answer(request_id, timeout)
        result = messages.layer_result(answer, step.starts)
        if result.step_ended:
            self._step = None
            for session, count, tree in zip(
                self._sessions, step.new_tokens, step.has_tree, strict=True
            ):
                # Which tokens of a tree are kept, `commit` says.
                session.length += 0 if tree else count
        return result

    def _after_loss(self, error: AttnserveError) -> AttnserveError:
        """What to raise after the stream was lost: whether the sessions were lost with it."""
        self._step = None
        lost = []
        for session in self._sessions:
            try:
                session.renew(timeout=_FIND_SECONDS)
            except _errors.NotFoundError:
                lost.append(session.id)
            except AttnserveError:
                return error  # no server to ask
        if lost:
            return _errors.NotFoundError(
                f"{error.message}; sessions lost: {', '.join(lost)}", method=METHOD
            )
        lengths = [session.length for session in self._sessions]
        return _errors.from_status(
            error.code,
            f"{error.message}; the step is lost, its sessions are there, of lengths {lengths}: "
            "begin the step anew",
            METHOD,
            error.retry_after,
        )


def _with_id(request: pb.DecodeRequest, request_id: int) -> bytes:
    request.request_id = request_id
    return request.SerializeToString()
