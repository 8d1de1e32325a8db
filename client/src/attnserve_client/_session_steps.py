"""Steps of KV sessions, of one or of many together."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _arguments as arguments
from attnserve_client import _deadlines, _errors
from attnserve_client import _session_layers as layers
from attnserve_client import _session_messages as messages
from attnserve_client import _shared_layers as shared_layers
from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Call, Exchange, Flow
from attnserve_client._results import LayerResult
from attnserve_client._session_beginnings import Beginning, Beginnings
from attnserve_client._session_layers import Attended, LayerPlan, Rows
from attnserve_client._session_messages import METHOD
from attnserve_client._session_state import SessionState, Stream
from attnserve_client._sharing_flows import SharingFlows

# How long it is asked after a lost connection whether sessions survived, seconds: as long as the
# call's timeout leaves, within these bounds.
_LEAST_FIND_SECONDS, _FIND_SECONDS = 1.0, 30.0
_NOT_FOUND = grpc.StatusCode.NOT_FOUND
_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


class ScatteredError(Exception):
    """The sessions of a batch are at several servers now; nothing was done."""


@dataclass(slots=True)
class _Step:
    """A step that is under way.

    Attributes:
        kept, starts: as `Beginning` has them.
        unsure: whether an answer was not waited for.
    """

    stream: Stream
    step_id: int
    kept: list[int]
    starts: tuple[int, ...]
    unsure: bool = False


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer to be computed.

    Attributes:
        timeout: seconds that it may take; None: any.
        until: when they are over, on the monotonic clock.
    """

    layer: int
    returns: bytes
    tensors: dict[str, Rows]
    plan: LayerPlan
    timeout: float | None
    until: float | None


@dataclass(frozen=True, slots=True)
class _Early:
    """A layer whose queries were sent ahead.

    Attributes:
        begun: what the stream knows it by.
        begins: whether it begins its step.
    """

    begun: Any
    begins: bool


class BatchFlows:
    """Steps of several sessions together.

    A step adds tokens to each session: it begins with layer 0, and ends once every layer has been
    computed. Not to be used by several threads, or tasks, at once; different batches may.

    Attributes:
        sessions: whose steps they are.
        adds: whether the last step, or that under way, adds tokens, or has a tree.
    """

    def __init__(self, sessions: Sequence[SessionState]) -> None:
        self._connection = sessions[0]._connection  # of the step under way, or the last one
        self._moves_seen = -1
        self._sessions = self.sessions = tuple(sessions)
        self.adds = True
        self._step: _Step | None = None
        self._beginnings = Beginnings(self._sessions)
        self._early: dict[int, _Early] = {}

    @property
    def server(self) -> str:
        """The address of the server of the step under way, or of the last one."""
        return self._connection.address

    @property
    def in_step(self) -> bool:
        """Whether a step is under way."""
        return self._step is not None

    def attend(
        self,
        layer: int,
        query: Any = None,
        key: Any = None,
        value: Any = None,
        *,
        hidden_states: Any = None,
        new_tokens: Sequence[int] | None = None,
        parents: Sequence[Sequence[int] | None] | None = None,
        cross_tokens: Sequence[int] | int = 0,
        prefix_hashes: Sequence[Iterable[bytes]] | None = None,
        return_output: bool = True,
        return_log_sum_exp: bool = False,
        return_entropy: bool = False,
        return_weights_of: Sequence[int] = (),
        priority: int = 0,
        queries_only: bool = False,
        timeout: float | None = 60.0,
    ) -> Flow[LayerResult]:
        """Compute one layer of a step; layer 0 begins the step.

        Args:
            layer: 0-based; each once in a step.
            query: [T, H, D], the new tokens of all sessions one after another; or a list of one
                array for each session. dtype as the model's, as key and value.
            key: [T, Hkv, D], likewise; of a cross layer [C, Hkv, D] in a step with `cross_tokens`,
                else None.
            value: [T, Hkv, Dv], likewise; of a latent layer None.
            hidden_states: of layer models, instead of query, key and value: [T, E], likewise.
            new_tokens: with layer 0 and packed tensors: tokens of each session; None: as many of
                each.
            parents: with layer 0: for each session, the parent of each new token (-1: the last one
                before the step), or None where there is no tree.
            cross_tokens: with layer 0: keys that come for each session's cross layers; one number:
                for each session.
            prefix_hashes: with layer 0: for each session, the hashes of the pages that are full
                with this step, so that others may share them.
            return_output: send the output back.
            return_log_sum_exp: also the log-sum-exp of each query's scores.
            return_entropy: also the entropy of each query's weights, nats.
            return_weights_of: also the attention weights of these sessions: indices in the batch,
                ascending.
            priority: with layer 0: as in `AttentionClient.attend`.
            queries_only: with layer 0: no key and value come, nothing is added: the queries see
                the tokens that the sessions hold. So attention to keys at several servers is put
                together, by `merge_attention`.
            timeout: seconds; None waits for ever. After it the step is lost.

        Raises:
            AttnserveError: one subclass per gRPC status. The step is still there, and the layer can
                be sent again; if it says that the connection was lost, the step is not, and the
                message says whether the sessions are.
            TypeError: an argument cannot be read as an array.
            ValueError: tensors of a wrong rank, lengths that do not match, a layer other than 0
                without a step.
        """
        arguments.integer("layer", layer)
        timeout = arguments.seconds("timeout", timeout)
        tensors = given_rows(query, key, value, hidden_states)
        if layer in self._early:
            raise ValueError(
                f"layer: {layer}, whose query was sent ahead; allowed: attend_sent with its key "
                "and value"
            )
        returns = layers.returns_of(
            return_output, return_log_sum_exp, return_entropy, return_weights_of
        )
        plan = _plan(returns, tensors)
        wanted = _Layer(layer, returns, tensors, plan, timeout, _deadlines.until(timeout))
        if self._step is not None:
            return (yield from self._next(self._step, wanted))
        first = self._first_tensor(layer, tensors)

        def begin() -> Beginning:
            return self._beginnings.make(
                first, new_tokens, parents, cross_tokens, prefix_hashes, priority, queries_only
            )

        self.adds = not queries_only
        return (yield from self._first(begin, wanted))

    def send_query(
        self,
        layer: int,
        query: Any,
        *,
        new_tokens: Sequence[int] | None = None,
        parents: Sequence[Sequence[int] | None] | None = None,
        cross_tokens: Sequence[int] | int = 0,
        prefix_hashes: Sequence[Iterable[bytes]] | None = None,
        return_output: bool = True,
        return_log_sum_exp: bool = False,
        return_entropy: bool = False,
        return_weights_of: Sequence[int] = (),
        priority: int = 0,
        timeout: float | None = 60.0,
    ) -> Flow[None]:
        """Send the queries of a layer while its keys and values are still being computed.

        They are on their way when this returns; `attend_sent` sends the rest (the order of Lamina:
        https://arxiv.org/abs/2405.01814). What is wrong with them is said there.

        Args:
            timeout: seconds that sending may take.

        The others as those of `attend`.

        Raises:
            AttnserveError, TypeError, ValueError: as `attend`.
        """
        arguments.integer("layer", layer)
        timeout = arguments.seconds("timeout", timeout)
        if query is None:
            raise ValueError("query: not given; allowed: an array")
        if layer in self._early:
            raise ValueError(f"layer: {layer}, whose query was sent; allowed: attend_sent")
        tensors = {"query": layers.rows(query, "query")}
        options = layers.returns_of(
            return_output, return_log_sum_exp, return_entropy, return_weights_of
        )
        plan, packed = _plan(options, tensors), tuple(tensors.values())
        step, begins = self._step, self._step is None
        if step is None:
            first = self._first_tensor(layer, tensors)
            self._find()
            beginning = self._beginnings.make(
                first, new_tokens, parents, cross_tokens, prefix_hashes, priority, False
            )
            self.adds = True
            options = beginning.field + options
            stream = self._connection.streams.get()
            step = _Step(stream, stream.new_step(), beginning.kept, beginning.starts)

        def make(request_id: int) -> bytes:
            return plan.message(request_id, step.step_id, layer, options, packed)

        def send(left: float | None) -> Any:
            return step.stream.begin(make)

        until = _deadlines.until(timeout)
        try:
            begun = yield Call(send, timeout)
        except AttnserveError as error:
            if begins:
                raise
            self._forget_step(step)
            failure = yield from self._after_loss(error, until)
            raise failure from error
        self._step = step
        self._early[layer] = _Early(begun, begins)

    def attend_sent(
        self, layer: int, key: Any, value: Any = None, *, timeout: float | None = 60.0
    ) -> Flow[LayerResult]:
        """Compute a layer whose queries were sent by `send_query`.

        Args:
            layer: 0-based.
            key: [T, Hkv, D], as `attend` has it.
            value: [T, Hkv, Dv]; of a latent layer None.
            timeout: seconds; None waits for ever. After it the step is lost.

        Raises:
            AttnserveError: as `attend`; the layer can be sent again, query and all. So it must be
                if `error.moved` says that a session has moved: the SDK has not kept the query.
            TypeError: an argument cannot be read as an array.
            ValueError: tensors of a wrong rank; no query was sent.
        """
        arguments.integer("layer", layer)
        timeout = arguments.seconds("timeout", timeout)
        early, step = self._early.get(layer), self._step
        if early is None or step is None:
            raise ValueError(f"layer: {layer}, whose query was not sent; allowed: send_query first")
        if key is None:
            raise ValueError("key: not given; allowed: an array")
        tensors = {"key": layers.rows(key, "key")}
        if value is not None:
            tensors["value"] = layers.rows(value, "value")
        plan, packed = _plan(b"", tensors), tuple(tensors.values())

        def make(request_id: int) -> bytes:
            return plan.message(request_id, step.step_id, layer, b"", packed)

        def send(left: float | None) -> Any:
            return step.stream.finish(early.begun, make, plan.read, left)

        del self._early[layer]
        until = _deadlines.until(timeout)
        try:
            attended = yield from self._answered(step, Call(send, timeout))
        except AttnserveError as error:
            if early.begins or step.stream.failed:  # then the step has not begun, or is lost
                self._forget_step(step)
            if self._connection.moves.follows(error) or not step.stream.failed:
                raise
            failure = yield from self._after_loss(error, until)
            raise failure from error
        return self._taken(step, attended, early.begins)

    def abandon(self) -> Flow[None]:
        """Give up the step under way, if there is one: the sessions hold what they held before."""
        step = self._step
        if step is not None:
            self._forget_step(step)
        if step is None or step.stream.failed:
            return
        abandon = pb.AbandonStep(step_id=step.step_id)
        make = messages.making(pb.DecodeRequest(abandon_step=abandon))

        def send(left: float | None) -> Any:
            return step.stream.exchange(make, messages.read, left)

        try:
            yield Call(send, _FIND_SECONDS)
        except AttnserveError as error:
            # A stream that ended, and a step of which a session is gone, are abandoned already.
            if error.code not in _LOST | {_NOT_FOUND}:
                raise
        if step.unsure:
            yield from self._lengths_anew(_FIND_SECONDS)

    def _find(self) -> None:
        """Know where the sessions are, before a step.

        Raises:
            ScatteredError: at several servers.
        """
        moves = self._connection.moves
        count = moves.count
        if count == self._moves_seen:
            return
        connections = {session._here() for session in self._sessions}
        self._beginnings.forget()
        if len(connections) > 1:
            raise ScatteredError
        (self._connection,) = connections
        self._moves_seen = count

    def _first_tensor(self, layer: int, tensors: dict[str, Rows]) -> Rows:
        """What tells a step's new tokens; only layer 0 may begin it."""
        if layer != 0:
            raise ValueError(f"layer: {layer} without a step; allowed: 0, which begins one")
        return next(iter(tensors.values()))

    def _forget_step(self, step: _Step) -> None:
        """No step is under way, whatever became of it."""
        for early in self._early.values():
            step.stream.drop(early.begun)
        self._early.clear()
        self._step = None

    def _first(self, begin: Callable[[], Beginning], wanted: _Layer) -> Flow[LayerResult]:
        """Begin a step and compute its first layer, in one go.

        If the connection is lost under it, once more: but only if the sessions are known to be as
        they were, since a step of one layer may have ended just before. And wherever sessions have
        moved to: then nothing was done here.
        """
        before = [session.length for session in self._sessions]
        repeated = False
        while True:
            self._find()
            beginning = begin()
            stream = self._connection.streams.get()
            step = _Step(stream, stream.new_step(), beginning.kept, beginning.starts)
            try:
                self._step = step
                return (yield from self._compute(step, wanted, beginning.field))
            except AttnserveError as error:
                self._forget_step(step)
                if self._connection.moves.follows(error):
                    continue
                if not stream.failed:
                    raise
                failure = yield from self._after_loss(error, wanted.until)
                if failure is error:
                    raise
                same = [session.length for session in self._sessions] == before
                gone = error.code not in _LOST or isinstance(failure, _errors.NotFoundError)
                left = _deadlines.left(wanted.until)
                if repeated or gone or not same or left == 0:
                    raise failure from error
                repeated, wanted = True, replace(wanted, timeout=left)

    def _next(self, step: _Step, wanted: _Layer) -> Flow[LayerResult]:
        try:
            return (yield from self._compute(step, wanted))
        except AttnserveError as error:
            if not step.stream.failed:
                raise
            self._forget_step(step)
            failure = yield from self._after_loss(error, wanted.until)
            raise failure from error

    def _compute(self, step: _Step, wanted: _Layer, begin: bytes = b"") -> Flow[LayerResult]:
        memory = self._connection.memory
        answer_bytes = None
        if memory is not None:
            answer_bytes = shared_layers.answer_bytes(wanted.tensors, wanted.plan.returns)
        if memory is None or answer_bytes is None:
            attended = yield from self._sent(step, wanted, begin)
        else:
            attended = yield from self._shared(memory, answer_bytes, step, wanted, begin)
        return self._taken(step, attended, len(begin) > 0)

    def _taken(self, step: _Step, attended: Attended, begins: bool) -> LayerResult:
        """What a layer's answer says, also of the sessions."""
        if begins:
            for session, length in zip(self._sessions, attended.message.lengths, strict=True):
                session.length = length
        result = attended.result(step.starts)
        if result.step_ended:
            self._step = None
            for session, kept in zip(self._sessions, step.kept, strict=True):
                session.length += kept
        return result

    def _sent(self, step: _Step, wanted: _Layer, begin: bytes) -> Flow[Attended]:
        """A layer whose tensors travel within messages."""
        plan, options, tensors = wanted.plan, begin + wanted.returns, tuple(wanted.tensors.values())

        def make(request_id: int) -> bytes:
            return plan.message(request_id, step.step_id, wanted.layer, options, tensors)

        return self._answered(step, Exchange(step.stream, make, plan.read, wanted.timeout))

    def _answered(self, step: _Step, call: Call | Exchange) -> Flow[Attended]:
        try:
            attended: Attended = yield call
        except AttnserveError:
            raise
        except BaseException:  # an interrupt, or a task that is cancelled
            step.unsure = True
            raise
        return attended

    def _shared(
        self, memory: SharingFlows, answer_bytes: int, step: _Step, wanted: _Layer, begin: bytes
    ) -> Flow[Attended]:
        """A layer whose tensors lie in shared memory, and whose answer's will."""
        options, forgotten = begin + wanted.returns, False
        while True:
            arena, name = yield from memory.registered(wanted.timeout)
            placed = shared_layers.place(memory.sharing, arena, name, wanted.tensors, answer_bytes)
            make = partial(
                shared_layers.message,
                step_id=step.step_id,
                layer=wanted.layer,
                options=options,
                placed=placed,
            )
            read = partial(shared_layers.read, placed=placed)
            call = Exchange(step.stream, make, read, wanted.timeout)
            try:
                return (yield from self._answered(step, call))
            except BaseException as error:
                if not isinstance(error, AttnserveError) or step.stream.failed:
                    memory.lost(placed)
                    raise
                if forgotten or error.code != _NOT_FOUND or name not in error.message:
                    raise
            # The server was started anew, or took this for another caller after a reconnect.
            memory.sharing.forget(placed)
            forgotten = True

    def _after_loss(self, error: AttnserveError, until: float | None) -> Flow[AttnserveError]:
        """What to raise after the stream was lost: whether the sessions were lost with it.

        Args:
            error: that said so; given back as it is if there is no server to ask in time.
            until: when the call's time is up; None: never.
        """
        left = _deadlines.left(until)
        seconds = _FIND_SECONDS if left is None else min(left, _FIND_SECONDS)
        try:
            lost = yield from self._lengths_anew(max(seconds, _LEAST_FIND_SECONDS))
        except AttnserveError:
            return error
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

    def _lengths_anew(self, seconds: float) -> Flow[list[str]]:
        """Ask what the sessions hold, for so many seconds; the ids of those that are gone."""
        lost, until = [], _deadlines.until(seconds)
        for session in self._sessions:
            try:
                left = _deadlines.left(until, _deadlines.LEAST_SECONDS)
                yield from session._renewing(None, left)
            except _errors.NotFoundError:
                lost.append(session.id)
        return lost


def _plan(options: bytes, tensors: dict[str, Rows]) -> LayerPlan:
    kinds = tuple([(name, each.parts[0].dtype, each.shape) for name, each in tensors.items()])
    return layers.plan_of(options, kinds)


def given_rows(query: Any, key: Any, value: Any, hidden_states: Any) -> dict[str, Rows]:
    """The tensors of a layer that were given."""
    tensors = {}
    if hidden_states is not None:
        tensors["hidden_states"] = layers.rows(hidden_states, "hidden_states")
    if query is not None:
        tensors["query"] = layers.rows(query, "query")
    if key is not None:
        tensors["key"] = layers.rows(key, "key")
    if value is not None:
        tensors["value"] = layers.rows(value, "value")
    if "query" not in tensors and len(tensors) != ("hidden_states" in tensors):
        raise ValueError("query: not given; allowed: an array with key and value")
    if not tensors:
        raise ValueError("query: not given, nor hidden_states; allowed: one of them")
    return tensors
