"""Steps of KV sessions, of one or of many together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import grpc
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _arguments as arguments
from attnserve_client import _errors
from attnserve_client import _session_layers as layers
from attnserve_client import _session_messages as messages
from attnserve_client import _shared_layers as shared_layers
from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Call, Flow
from attnserve_client._results import LayerResult
from attnserve_client._session_layers import Attended, LayerPlan, Rows
from attnserve_client._session_messages import METHOD
from attnserve_client._session_state import Connection, SessionState, Stream
from attnserve_client._sharing_flows import SharingFlows

# How long it is asked after a lost connection whether sessions survived, seconds.
_FIND_SECONDS = 30.0
_INT32 = (1 << 31) - 1
_NOT_FOUND = grpc.StatusCode.NOT_FOUND
_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


@dataclass(slots=True)
class _Step:
    """A step that is under way.

    Attributes:
        kept: of each session, the new tokens that it holds when the step has ended; a tree's are
            kept by `commit`.
        starts: where each session's tokens begin, and where the last one's end.
        unsure: whether an answer was not waited for.
    """

    stream: Stream
    step_id: int
    kept: list[int]
    starts: tuple[int, ...]
    unsure: bool = False


@dataclass(frozen=True, slots=True)
class _Beginning:
    """What begins a step: as a field of the first layer, and as `_Step` has it."""

    field: bytes
    kept: list[int]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer to be computed."""

    layer: int
    returns: bytes
    tensors: dict[str, Rows]
    plan: LayerPlan
    timeout: float | None


class BatchFlows:
    """Steps of several sessions together.

    A step adds tokens to each session: it begins with layer 0, and ends once every layer has been
    computed. Not to be used by several threads, or tasks, at once; different batches may.
    """

    def __init__(self, connection: Connection, sessions: Sequence[SessionState]) -> None:
        allowed = "a list of sessions, one or more"
        self._connection = connection
        self._sessions: tuple[SessionState, ...] = tuple(
            arguments.items("sessions", sessions, allowed)
        )
        for session in self._sessions:
            arguments.kind("sessions", session, SessionState, allowed)
        if not self._sessions:
            raise ValueError("sessions: none; allowed: one or more")
        self._step: _Step | None = None
        self._plain: dict[tuple[int, ...], _Beginning] = {}  # of steps without anything special

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
        tensors = _given(query, key, value, hidden_states)
        returns = layers.returns_of(
            return_output, return_log_sum_exp, return_entropy, return_weights_of
        )
        kinds = tuple([(name, each.parts[0].dtype, each.shape) for name, each in tensors.items()])
        plan = layers.plan_of(returns, kinds)
        wanted = _Layer(layer, returns, tensors, plan, timeout)
        if self._step is not None:
            return (yield from self._next(self._step, wanted))
        if layer != 0:
            raise ValueError(f"layer: {layer} without a step; allowed: 0, which begins one")
        counts = self._counts(next(iter(tensors.values())), new_tokens)
        beginning = self._beginning(counts, parents, cross_tokens, prefix_hashes, priority)
        return (yield from self._first(beginning, wanted))

    def abandon(self) -> Flow[None]:
        """Give up the step under way, if there is one: the sessions hold what they held before."""
        step, self._step = self._step, None
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
            yield from self._lengths_anew()

    def _counts(self, first: Rows, new_tokens: Sequence[int] | None) -> tuple[int, ...]:
        """The new tokens of each session."""
        count = len(self._sessions)
        if new_tokens is None and len(first.parts) == count:
            return tuple(first.lengths)
        total = first.shape[0]
        lengths = (
            (total // count,) * count
            if new_tokens is None
            else tuple(arguments.integers("new_tokens", new_tokens))
        )
        if len(lengths) != count or sum(lengths) != total:
            raise ValueError(
                f"new_tokens: {list(lengths)} for {count} sessions and a query of {total} tokens; "
                "allowed: one number for each session, which add up to the query's tokens"
            )
        return lengths

    def _beginning(
        self,
        counts: tuple[int, ...],
        parents: Sequence[Sequence[int] | None] | None,
        cross_tokens: Sequence[int] | int,
        prefix_hashes: Sequence[Iterable[bytes]] | None,
        priority: int,
    ) -> _Beginning:
        plain = parents is None and prefix_hashes is None and (cross_tokens, priority) == (0, 0)
        if plain and counts in self._plain:
            return self._plain[counts]
        begin = pb.BeginStep(priority=arguments.integer("priority", priority, 0, 3))
        if not isinstance(cross_tokens, list | tuple):
            cross_tokens = [arguments.integer("cross_tokens", cross_tokens)] * len(counts)
        crossing = self._each("cross_tokens", arguments.integers("cross_tokens", cross_tokens), 0)
        trees = self._each("parents", parents, None)
        hashes = self._each("prefix_hashes", prefix_hashes, ())
        for session, new, tree, pages, cross in zip(
            self._sessions, counts, trees, hashes, crossing, strict=True
        ):
            begin.sessions.add(
                session_id=session.id,
                new_tokens=new,
                parents=() if tree is None else arguments.integers("parents", tree, -1, _INT32),
                cross_tokens=cross,
                prefix_hashes=messages.joined_hashes("prefix_hashes", pages),
            )
        kept = [0 if each.parents else each.new_tokens for each in begin.sessions]
        starts = tuple(accumulate(counts, initial=0))
        beginning = _Beginning(layers.begin_of(begin), kept, starts)
        if plain:
            self._plain = {counts: beginning}  # the next step is most often like this one
        return beginning

    def _each(self, name: str, given: Any, nothing: Any) -> list[Any]:
        """What is given for each session; None: nothing for any."""
        count = len(self._sessions)
        if given is None:
            return [nothing] * count
        each = arguments.items(name, given, f"a list of {count}, one for each session")
        if len(each) != count:
            raise arguments.refused(name, given, f"a list of {count}, one for each session")
        return each

    def _first(self, beginning: _Beginning, wanted: _Layer) -> Flow[LayerResult]:
        """Begin a step and compute its first layer, in one go.

        If the connection is lost under it, once more: but only if the sessions are as they were,
        since a step of one layer may have ended just before.
        """
        before = [session.length for session in self._sessions]
        repeated = False
        while True:
            stream = self._connection.streams.get()
            step = _Step(stream, stream.new_step(), beginning.kept, beginning.starts)
            try:
                self._step = step
                return (yield from self._compute(step, wanted, beginning.field))
            except AttnserveError as error:
                self._step = None
                if not stream.failed:
                    raise
                failure = yield from self._after_loss(error)
                same = [session.length for session in self._sessions] == before
                gone = error.code not in _LOST or isinstance(failure, _errors.NotFoundError)
                if repeated or gone or not same:
                    raise failure from error
                repeated = True

    def _next(self, step: _Step, wanted: _Layer) -> Flow[LayerResult]:
        try:
            return (yield from self._compute(step, wanted))
        except AttnserveError as error:
            if not step.stream.failed:
                raise
            self._step = None
            failure = yield from self._after_loss(error)
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
        if begin:
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

        def send(left: float | None) -> Any:
            return step.stream.exchange(make, plan.read, left)

        return self._answered(step, Call(send, wanted.timeout))

    def _answered(self, step: _Step, call: Call) -> Flow[Attended]:
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
            call = Call(
                partial(step.stream.exchange, make, partial(shared_layers.read, placed=placed)),
                wanted.timeout,
            )
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

    def _after_loss(self, error: AttnserveError) -> Flow[AttnserveError]:
        """What to raise after the stream was lost: whether the sessions were lost with it."""
        try:
            lost = yield from self._lengths_anew()
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

    def _lengths_anew(self) -> Flow[list[str]]:
        """Ask what the sessions hold; the ids of those that are gone."""
        lost = []
        for session in self._sessions:
            try:
                yield from session._renewing(None, _FIND_SECONDS)
            except _errors.NotFoundError:
                lost.append(session.id)
        return lost


def _given(query: Any, key: Any, value: Any, hidden_states: Any) -> dict[str, Rows]:
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
