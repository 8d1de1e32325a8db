"""Requests of `attend`: from arguments to bytes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Required, TypedDict

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import encoding, wire
from attnserve_proto.frames import REQUEST_PADDING, Frame, lay_out

from attnserve_client import _arguments as arguments
from attnserve_client import _tensors
from attnserve_client._answers import AnswerReader, Starts
from attnserve_client._channel import CHUNK_BYTES
from attnserve_client._results import Array, StoredTensor

# Requests from this size on go some heads at a time, in about so many parts.
_INTERLEAVED_BYTES = 4 << 20
_PARTS = 2
_CORE = ("query", "key", "value")
_INTEGERS = {
    "key_lengths": "[B] integers",
    "prefix_lengths": "[B] integers, or [N] if packed",
    "cu_seqlens_q": "[N + 1] integers",
    "cu_seqlens_k": "[N + 1] integers",
}

_REQUEST_FIELD = {name: number for number, name in wire.REQUEST_TENSORS.items()}
_STREAM_ID = encoding.tag(pb.AttendStreamRequest.REQUEST_ID_FIELD_NUMBER, 0)
_STREAM_TIMEOUT = encoding.tag(pb.AttendStreamRequest.TIMEOUT_FIELD_NUMBER, 0)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is known of a tensor without its elements."""

    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def header(self, *, chunked: bool = False) -> bytes:
        """The `Tensor` message without its elements; `chunked` announces that these follow."""
        tensor = _tensors.header(self.dtype, self.shape)
        if chunked:
            tensor.chunked.byte_size = self.nbytes
        return tensor.SerializeToString()


class Plan:
    """How requests of one kind are laid out: callers send the same again with other elements.

    Args:
        head: everything but the tensors, serialised.
        kinds: of the tensors that are sent, by field name.

    Attributes:
        head: as given.
        request_bytes: of all tensors that are sent.
        response_bytes: of those asked for, near enough to choose a transport by.
        message: the request as one message.
        answers: reads what comes back.
    """

    def __init__(self, head: bytes, kinds: Mapping[str, _Kind]) -> None:
        self.head = head
        self._kinds = kinds
        self.request_bytes = sum(kind.nbytes for kind in kinds.values())
        self.response_bytes = _response_bytes(pb.AttendRequest.FromString(head).returns, kinds)
        self.message = _lay_out(head, kinds)
        self.answers = AnswerReader()

    @cached_property
    def streamed(self) -> "StreamPlan":
        """The request as messages of a stream."""
        return StreamPlan(self.head, self._kinds)


class StreamPlan:
    """How requests of one kind go over AttendStream.

    The first message holds the tensors that have room in it; chunks of the others follow.

    Attributes:
        first: the first message, but for request id and timeout.
        inline: the tensors in it.
        chunks: what follows, one after another: bytes [start, end) of a tensor.
    """

    def __init__(self, head: bytes, kinds: Mapping[str, _Kind]) -> None:
        interleaved = _interleaves(kinds)
        announced = head
        inline: dict[str, _Kind] = {}
        chunked: dict[str, _Kind] = {}
        room = CHUNK_BYTES
        for name in sorted(kinds, key=_REQUEST_FIELD.__getitem__):
            kind = kinds[name]
            if kind.nbytes <= room and not (interleaved and name in _CORE):
                inline[name] = kind
                room -= kind.nbytes
            else:
                chunked[name] = kind
                announced += encoding.embedded(_REQUEST_FIELD[name], kind.header(chunked=True))
        self.inline = tuple(inline)
        self.first = _enclosed(announced, inline)
        self.chunks = tuple(
            _heads_in_turns(chunked)
            if interleaved
            else ((name, 0, kind.nbytes) for name, kind in chunked.items())
        )


@dataclass(frozen=True, slots=True)
class AttendCall:
    """One attend request.

    Attributes:
        plan: how it is laid out.
        tensors: those that are sent, by field name.
        stored: those that the server keeps.
    """

    plan: Plan
    tensors: dict[str, Array]
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Shape and bytes of an element of each tensor, sent or kept."""
        every: dict[str, Array | StoredTensor] = {**self.tensors, **self.stored}
        return {name: (tensor.shape, tensor.dtype.itemsize) for name, tensor in every.items()}

    @property
    def starts(self) -> Starts:
        """Where each packed sequence begins; none of stored tensors that another client put."""
        queries = self._integers("cu_seqlens_q")
        keys = self._integers("cu_seqlens_k") if self._given("cu_seqlens_k") else queries
        return None if queries is None or keys is None else (queries, keys)

    def _given(self, name: str) -> bool:
        return name in self.tensors or name in self.stored

    def _integers(self, name: str) -> Array | None:
        stored = self.stored.get(name)
        return self.tensors.get(name) if stored is None else stored.integers

    def to_bytes(self) -> bytes:
        """The whole request as one message."""
        return self.plan.message.fill(list(self.tensors.values()))

    def to_stream(self, request_id: int, timeout: float | None) -> Iterator[bytes]:
        """The request as stream messages: the announcement, then its chunks, if it has any."""
        yield self.announcement(request_id, timeout)
        for name, start, end in self.plan.streamed.chunks:
            view = _tensors.data(self.tensors[name])[start:end]
            yield from wire.cut(request_id, _REQUEST_FIELD[name], view, CHUNK_BYTES, start)

    def announcement(self, request_id: int, timeout: float | None) -> bytes:
        """The first message of a stream's request; if it has no chunks, the only one."""
        streamed = self.plan.streamed
        parts = streamed.first.parts([self.tensors[name] for name in streamed.inline])
        parts += (_STREAM_ID, encoding.varint(request_id))
        if timeout is not None:
            parts += (_STREAM_TIMEOUT, encoding.varint(max(1, round(timeout * 1e6))))
        return b"".join(parts)


class AttendOptions(TypedDict, total=False):
    """What `attend` takes by name.

    Attributes:
        model: its name; `client.list_models()` lists them.
        version: empty is the highest.
        variant: force one; empty lets the server pick.
        hidden_states: [B, Sq, E], for a layer model, instead of query, key and value.
        context: [B, Sk, E], for a cross-attention layer.
        key_lengths: [B] integers; keys from that position on are padding.
        bias: added to the scores; [B or 1, H or 1, Sq or 1, Sk or 1]. Of bool, as PyTorch's
            attn_mask: true where the query may see the key.
        sinks: [H] numbers, by core models: a logit of each head that takes part in the softmax and
            has no value; -inf is none. None: the model's own, if it has any.
        prefix_lengths: [B] integers; valid keys before that position are seen by all queries
            (prefix-LM), by causal models. Packed: [N].
        cu_seqlens_q, cu_seqlens_k: [N + 1] integers: N sequences are packed into one row, B = 1,
            and sequence n has queries cu_seqlens_q[n] to cu_seqlens_q[n + 1] and those keys of
            cu_seqlens_k, which may be left out where it is the same.
        scale: multiplies query x key; None is the model's own.
        softcap: None is the model's own, 0 none.
        return_output: also send the output back; it is, unless this is False.
        return_weights: also send the attention weights, [B, H, Sq, Sk].
        return_entropy: also the entropy of each query's weights, nats.
        top_k: also the heaviest keys of each query, this many.
        return_mass_per_key: also the weight each key receives over all queries.
        mass_by_distance: also the weight given at each distance between query and key, for this
            many distances; the last one gathers all beyond.
        return_log_sum_exp: also the log-sum-exp of each query's scores, sinks included, to merge
            with attention to other keys: see `merge_attention`.
        priority: who is served first among those that wait: 1 high, 2 or 0 normal, 3 low.
    """

    model: Required[str]
    version: str | int
    variant: str
    hidden_states: Any
    context: Any
    key_lengths: Any
    bias: Any
    sinks: Any
    prefix_lengths: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    scale: float | None
    softcap: float | None
    return_output: bool
    return_weights: bool
    return_entropy: bool
    top_k: int
    return_mass_per_key: bool
    mass_by_distance: int
    return_log_sum_exp: bool
    priority: int


def attend_call(
    query: Any,
    key: Any,
    value: Any,
    *,
    model: str,
    version: str | int = "",
    variant: str = "",
    hidden_states: Any = None,
    context: Any = None,
    key_lengths: Any = None,
    bias: Any = None,
    sinks: Any = None,
    prefix_lengths: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_output: bool = True,
    return_weights: bool = False,
    return_entropy: bool = False,
    top_k: int = 0,
    return_mass_per_key: bool = False,
    mass_by_distance: int = 0,
    return_log_sum_exp: bool = False,
    priority: int = 0,
) -> AttendCall:
    """Build a request from the arguments of `attend`; tensors that are None are left out."""
    options = (
        model,
        version,
        variant,
        scale,
        softcap,
        return_output,
        return_weights,
        return_entropy,
        top_k,
        return_mass_per_key,
        mass_by_distance,
        return_log_sum_exp,
        priority,
    )
    try:
        head = _head(*options)
    except TypeError:  # what cannot be looked up is of a wrong type: this says which
        head = _head.__wrapped__(*options)
    arrays: dict[str, Array] = {}
    stored: dict[str, StoredTensor] = {}
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "hidden_states": hidden_states,
        "context": context,
        "key_lengths": key_lengths,
        "bias": bias,
        "sinks": sinks,
        "prefix_lengths": prefix_lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    for name, given in tensors.items():
        if given is None:
            continue
        if isinstance(given, StoredTensor):
            stored[name] = given
            head += encoding.embedded(
                _REQUEST_FIELD[name], pb.Tensor(stored=given.handle).SerializeToString()
            )
            continue
        array = _tensors.as_array(given, name)
        if name in _INTEGERS:
            if array.dtype.kind != "i":
                raise arguments.mistyped(name, given, _INTEGERS[name])
            array = array.astype(np.int64)
        elif name == "sinks":
            array = array.astype(np.float32)
        arrays[name] = array
    return AttendCall(plan_of(head, arrays), arrays, stored)


def plan_of(head: bytes, arrays: Mapping[str, Array]) -> Plan:
    """The plan of requests with this head and tensors like these, which need not be made anew."""
    return _plan(head, tuple((name, array.dtype, array.shape) for name, array in arrays.items()))


@lru_cache(maxsize=256)
def _plan(head: bytes, kinds: "tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]") -> Plan:
    return Plan(head, {name: _Kind(dtype, shape) for name, dtype, shape in kinds})


@lru_cache(maxsize=256, typed=True)
def _head(
    model: str,
    version: str | int,
    variant: str,
    scale: float | None,
    softcap: float | None,
    return_output: bool,
    return_weights: bool,
    return_entropy: bool,
    top_k: int,
    return_mass_per_key: bool,
    mass_by_distance: int,
    return_log_sum_exp: bool,
    priority: int,
) -> bytes:
    own = ", or None: the model's own"
    message = pb.AttendRequest(
        model=arguments.text("model", model, empty=False),
        version=arguments.version("version", version),
        variant=arguments.text("variant", variant),
        scale=None if scale is None else arguments.number("scale", scale, also=own),
        softcap=None if softcap is None else arguments.number("softcap", softcap, 0, own),
        priority=arguments.integer("priority", priority, 0, 3),
        returns=pb.ReturnOptions(
            no_output=not arguments.flag("return_output", return_output),
            weights=arguments.flag("return_weights", return_weights),
            entropy=arguments.flag("return_entropy", return_entropy),
            top_k=arguments.integer("top_k", top_k),
            mass_per_key=arguments.flag("return_mass_per_key", return_mass_per_key),
            mass_by_distance=arguments.integer("mass_by_distance", mass_by_distance),
            log_sum_exp=arguments.flag("return_log_sum_exp", return_log_sum_exp),
        ),
    )
    return message.SerializeToString()


def _response_bytes(returns: pb.ReturnOptions, kinds: Mapping[str, _Kind]) -> int:
    first = kinds.get("query", kinds.get("hidden_states"))
    if first is None or len(first.shape) < 2:
        return 0
    total = 0 if returns.no_output else first.nbytes
    if returns.weights:
        other = kinds.get("key", kinds.get("context", first))
        # A layer's heads are not known here: one is assumed.
        rows = math.prod(first.shape[:-1])
        keys = other.shape[-2] if len(other.shape) > 1 else 1
        total += rows * keys * first.dtype.itemsize
    return total


def _lay_out(head: bytes, kinds: Mapping[str, _Kind], before: int = 0) -> Frame:
    parts = [(_REQUEST_FIELD[name], kind.header(), kind.nbytes) for name, kind in kinds.items()]
    return lay_out(head, parts, REQUEST_PADDING, before)


def _enclosed(head: bytes, kinds: Mapping[str, _Kind]) -> Frame:
    """A request as the first field of an `AttendStreamRequest`."""
    before = b""
    # What precedes the request may make its padding longer, and that its length.
    for _ in range(3):
        frame = _lay_out(head, kinds, len(before))
        size = frame.end - len(before)
        before = encoding.tag(wire.STREAM_MESSAGE) + encoding.varint(size)
    return Frame((before + frame.pieces[0], *frame.pieces[1:]), frame.rooms, frame.end)


def _interleaves(kinds: Mapping[str, _Kind]) -> bool:
    """Whether large query, key and value of one sequence go some heads of each at a time.

    The server computes those while the others are on their way.
    """
    core = [kinds[name] for name in _CORE if name in kinds]
    return (
        len(core) == len(_CORE)
        and all(len(kind.shape) == 4 and kind.shape[0] == 1 for kind in core)
        and all(kind.nbytes > 0 for kind in core)
        and kinds["key"].shape[1] == kinds["value"].shape[1]
        and sum(kind.nbytes for kind in kinds.values()) >= _INTERLEAVED_BYTES
    )


def _heads_in_turns(chunked: Mapping[str, _Kind]) -> Iterator[tuple[str, int, int]]:
    """What goes one after another: others first, then query, key and value in turns."""
    yield from ((name, 0, kind.nbytes) for name, kind in chunked.items() if name not in _CORE)
    num_heads = chunked["key"].shape[1]
    head_bytes = chunked["key"].nbytes // num_heads
    together = max(1, min(CHUNK_BYTES // head_bytes, num_heads // _PARTS))
    for first in range(0, num_heads, together):
        last = min(first + together, num_heads)
        for name in _CORE:
            size = chunked[name].nbytes
            yield name, size * first // num_heads, size * last // num_heads
