"""Requests from arguments and results from answers: what the two clients share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import buffers, encoding, wire
from attnserve_proto.frames import REQUEST_PADDING, Frame, lay_out

from attnserve_client import _tensors
from attnserve_client._results import (
    Array,
    AttendResult,
    Limits,
    Model,
    ServerInfo,
    StoredTensor,
    Timings,
    TokensResult,
    TransformerAttention,
    Variant,
)

# Requests from this size on go some heads at a time, in about so many parts.
_INTERLEAVED_BYTES = 4 << 20
_PARTS = 2

_REQUEST_FIELD = {name: number for number, name in wire.REQUEST_TENSORS.items()}

Tokens = Sequence[str] | Sequence[Sequence[int]] | Array


@dataclass(frozen=True, slots=True)
class AttendCall:
    """One attend request.

    Attributes:
        head: everything but the tensors, serialised.
        tensors: those that are sent, by field name.
        no_output, return_weights: as in `ReturnOptions`.
        stored: those that the server keeps.
    """

    head: bytes
    tensors: dict[str, Array]
    no_output: bool
    return_weights: bool
    stored: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Shape and bytes of an element of each tensor, sent or kept."""
        every: dict[str, Array | StoredTensor] = {**self.tensors, **self.stored}
        return {name: (tensor.shape, tensor.dtype.itemsize) for name, tensor in every.items()}

    @property
    def request_bytes(self) -> int:
        """Bytes of all tensors that are sent."""
        return sum(array.nbytes for array in self.tensors.values())

    @property
    def response_bytes(self) -> int:
        """Bytes of the tensors asked for, near enough to choose a transport by."""
        first = self.tensors.get("query", self.tensors.get("hidden_states"))
        if first is None or first.ndim < 2:
            return 0
        total = 0 if self.no_output else first.nbytes
        if self.return_weights:
            other = self.tensors.get("key", self.tensors.get("context", first))
            # A layer's heads are not known here: one is assumed.
            rows = first.size // first.shape[-1]
            total += rows * (other.shape[-2] if other.ndim > 1 else 1) * first.itemsize
        return total

    def to_bytes(self) -> bytes:
        """The whole request as one message."""
        kinds = tuple(
            (_REQUEST_FIELD[name], array.dtype, array.shape, array.nbytes)
            for name, array in self.tensors.items()
        )
        return _frame(self.head, kinds).fill([_tensors.data(a) for a in self.tensors.values()])

    def to_stream(
        self, request_id: int, timeout: float | None, chunk_bytes: int
    ) -> Iterator[bytes]:
        """The request as stream messages: the announcement, then each tensor in chunks."""
        request = pb.AttendRequest.FromString(self.head)
        for name, array in self.tensors.items():
            tensor = _tensors.header(array.dtype, array.shape)
            tensor.chunked.byte_size = array.nbytes
            getattr(request, name).CopyFrom(tensor)
        first = pb.AttendStreamRequest(
            request_id=request_id,
            request=request,
            timeout=0 if timeout is None else max(1, round(timeout * 1e6)),
        )
        yield first.SerializeToString()
        for name, start, end in self._order(chunk_bytes):
            view = _tensors.data(self.tensors[name])[start:end]
            yield from wire.cut(request_id, _REQUEST_FIELD[name], view, chunk_bytes, start)

    def _order(self, chunk_bytes: int) -> Iterator[tuple[str, int, int]]:
        """What to send one after another: bytes [start, end) of a tensor.

        Large query, key and value of one sequence go some heads of each at a time: the server
        computes those while the others are on their way.
        """
        names = sorted(self.tensors, key=_REQUEST_FIELD.__getitem__)
        core = {"query", "key", "value"}
        heads = {self.tensors[n].shape[1] for n in ("key", "value") if self._interleaves(n)}
        if (
            not core <= self.tensors.keys()
            or not self._interleaves("query")
            or len(heads) != 1
            or self.request_bytes < _INTERLEAVED_BYTES
        ):
            yield from ((name, 0, self.tensors[name].nbytes) for name in names)
            return
        yield from ((name, 0, self.tensors[name].nbytes) for name in names if name not in core)
        (num_heads,) = heads
        head_bytes = self.tensors["key"].nbytes // num_heads
        together = max(1, min(chunk_bytes // head_bytes, num_heads // _PARTS))
        for first in range(0, num_heads, together):
            last = min(first + together, num_heads)
            for name in ("query", "key", "value"):
                size = self.tensors[name].nbytes
                yield name, size * first // num_heads, size * last // num_heads

    def _interleaves(self, name: str) -> bool:
        array = self.tensors.get(name)
        return array is not None and array.ndim == 4 and array.shape[0] == 1


@lru_cache(maxsize=256)
def _frame(
    head: bytes, kinds: tuple[tuple[int, "np.dtype[Any]", tuple[int, ...], int], ...]
) -> Frame:
    """A request laid out; callers send the same one again and again with other elements."""
    parts = [
        (number, _tensors.header(dtype, shape).SerializeToString(), size)
        for number, dtype, shape, size in kinds
    ]
    return lay_out(head, parts, REQUEST_PADDING)


def attend_call(
    tensors: dict[str, Any],
    *,
    model: str,
    version: str,
    variant: str,
    scale: float | None,
    softcap: float | None,
    no_output: bool,
    return_weights: bool,
    return_entropy: bool,
    top_k: int,
    return_mass_per_key: bool,
    mass_by_distance: int,
    priority: int,
) -> AttendCall:
    """Build a request from the arguments of `attend`; tensors that are None are left out."""
    if top_k < 0:
        raise ValueError(f"top_k: {top_k}; allowed: 0 (off) or more")
    if mass_by_distance < 0:
        raise ValueError(f"mass_by_distance: {mass_by_distance}; allowed: 0 (off) or more")
    if priority < 0:
        raise ValueError(f"priority: {priority}; allowed: 0 (normal) or more")
    head = _head(
        model,
        version,
        variant,
        scale,
        softcap,
        no_output,
        return_weights,
        return_entropy,
        top_k,
        return_mass_per_key,
        mass_by_distance,
        priority,
    )
    arrays: dict[str, Array] = {}
    stored: dict[str, StoredTensor] = {}
    for name, value in tensors.items():
        if value is None:
            continue
        if isinstance(value, StoredTensor):
            stored[name] = value
            head += encoding.embedded(
                _REQUEST_FIELD[name], pb.Tensor(stored=value.handle).SerializeToString()
            )
            continue
        array = _tensors.as_array(value, name)
        if name == "key_lengths":
            array = array.astype(np.int64, casting="same_kind")
        arrays[name] = array
    return AttendCall(head, arrays, no_output, return_weights, stored)


@lru_cache(maxsize=256)
def _head(
    model: str,
    version: str,
    variant: str,
    scale: float | None,
    softcap: float | None,
    no_output: bool,
    return_weights: bool,
    return_entropy: bool,
    top_k: int,
    return_mass_per_key: bool,
    mass_by_distance: int,
    priority: int,
) -> bytes:
    message = pb.AttendRequest(
        model=model,
        version=version,
        variant=variant,
        scale=scale,
        softcap=softcap,
        priority=priority,
        returns=pb.ReturnOptions(
            no_output=no_output,
            weights=return_weights,
            entropy=return_entropy,
            top_k=top_k,
            mass_per_key=return_mass_per_key,
            mass_by_distance=mass_by_distance,
        ),
    )
    return message.SerializeToString()


def put_messages(array: Array, lease: float | None, chunk_bytes: int) -> Iterator[bytes]:
    """The messages of PutTensor: the header, then the elements in chunks."""
    tensor = _tensors.header(array.dtype, array.shape)
    tensor.chunked.byte_size = array.nbytes
    header = pb.PutTensorHeader(tensor=tensor, lease=round((lease or 0) * 1e6))
    yield pb.PutTensorRequest(header=header).SerializeToString()
    view = _tensors.data(array)
    for offset in range(0, view.nbytes, chunk_bytes):
        yield wire.encode_put_chunk(wire.Chunk(0, 0, offset, view[offset : offset + chunk_bytes]))


def stored_from(
    answer: pb.StoredTensor, shape: tuple[int, ...], dtype: "np.dtype[Any]"
) -> StoredTensor:
    """What the server keeps."""
    return StoredTensor(answer.handle, answer.lease / 1e6, shape, dtype)


def attend_result(response: pb.AttendResponse, arrays: dict[str, Array]) -> AttendResult:
    """The result of an answer whose tensors lie in `arrays`, by field name."""
    return AttendResult(
        model=response.model,
        version=response.version,
        variant=response.variant,
        timings=timings_from(response.timings),
        **arrays,
    )


def attend_result_from_bytes(answer: bytes) -> AttendResult:
    """The result of a unary answer that nobody else holds: its arrays lie in it, writable."""
    response, rooms = wire.locate(answer, pb.AttendResponse, wire.RESPONSE_TENSORS)
    view = buffers.adopt(answer)
    arrays = {
        name: _tensors.lying_in(getattr(response, name), view[start:end])
        for name, (start, end) in rooms.items()
    }
    return attend_result(response, arrays)


def tokens_request(
    inputs: Tokens,
    *,
    model: str,
    version: str,
    variant: str,
    targets: Tokens | None,
    attention: str,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    return_hidden: bool,
    return_pooled: bool,
    return_weights: bool | None,
    return_entropy: bool,
    return_effective_context: bool,
    mass_by_distance: int,
    mass_on_first: int,
    truncate: bool,
) -> pb.AttendTokensRequest:
    """Build a request from the arguments of `attend_tokens`."""
    for name, count in (("mass_by_distance", mass_by_distance), ("mass_on_first", mass_on_first)):
        if count < 0:
            raise ValueError(f"{name}: {count}; allowed: 0 (off) or more")
    request = pb.AttendTokensRequest(model=model, version=str(version), variant=variant)
    given = _batch("inputs", inputs, truncate)
    if isinstance(given, pb.TextBatch):
        request.text.CopyFrom(given)
    else:
        request.tokens.CopyFrom(given)
    if targets is not None:
        target = _batch("targets", targets, truncate)
        if isinstance(target, pb.TextBatch):
            request.target_text.CopyFrom(target)
        else:
            request.target_tokens.CopyFrom(target)
    said = return_entropy or return_effective_context or mass_by_distance or mass_on_first
    if return_weights is None:
        return_weights = not said and (layers is not None or heads is not None)
    request.returns.CopyFrom(
        pb.TokenReturnOptions(
            no_hidden=not return_hidden,
            pooled=return_pooled,
            weights=return_weights,
            entropy=return_entropy,
            attention=attention,
            layers=layers or [],
            heads=heads or [],
            effective_context=return_effective_context,
            mass_by_distance=mass_by_distance,
            mass_on_first=mass_on_first,
        )
    )
    return request


def _batch(name: str, sequences: Tokens, truncate: bool) -> pb.TextBatch | pb.TokenBatch:
    if isinstance(sequences, (str, bytes)):
        raise TypeError(f"{name}: give a list of texts or of id sequences, not one text")
    items = list(sequences)
    if items and all(isinstance(item, str) for item in items):
        return pb.TextBatch(texts=items, truncate=truncate)
    if any(isinstance(item, str) for item in items):
        raise TypeError(f"{name}: texts and id sequences cannot be mixed")
    return pb.TokenBatch(
        sequences=[pb.TokenSequence(ids=[int(token) for token in item]) for item in items]
    )


def tokens_result(response: pb.AttendTokensResponse) -> TokensResult:
    """The result of an answer."""

    def arrays(name: str) -> list[Array] | None:
        if not response.sequences or not response.sequences[0].HasField(name):  # type: ignore[arg-type]
            return None
        tensors = [getattr(sequence, name) for sequence in response.sequences]
        return [_tensors.copy_of(tensor, tensor.data) for tensor in tensors]

    return TokensResult(
        model=response.model,
        version=response.version,
        variant=response.variant,
        timings=timings_from(response.timings),
        ids=[list(sequence.ids) for sequence in response.sequences],
        tokens=[list(sequence.tokens) for sequence in response.sequences],
        truncated=[sequence.truncated for sequence in response.sequences],
        hidden=arrays("hidden"),
        pooled=arrays("pooled"),
        weights=arrays("weights"),
        entropy=arrays("entropy"),
        layers=list(response.layers),
        heads=list(response.heads),
        attention=response.attention,
        effective_context=arrays("effective_context"),
        mass_by_distance=arrays("mass_by_distance"),
        mass_on_first=arrays("mass_on_first"),
        encoder_hidden=arrays("encoder_hidden"),
        target_ids=[list(sequence.target_ids) for sequence in response.sequences],
        target_tokens=[list(sequence.target_tokens) for sequence in response.sequences],
        target_truncated=[sequence.target_truncated for sequence in response.sequences],
    )


def model_from(message: pb.Model, manifest: str = "") -> Model:
    """A model's description."""
    return Model(
        name=message.name,
        version=message.version,
        kind=pb.ModelKind.Name(message.kind).lower(),
        dtype=_tensors.dtype_name(message.dtype),
        num_heads=message.num_heads,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        value_head_dim=message.value_head_dim,
        mask=pb.MaskKind.Name(message.mask).lower(),
        window=message.window,
        scale=message.scale,
        softcap=message.softcap,
        embed_dim=message.embed_dim,
        num_layers=message.num_layers,
        vocab_size=message.vocab_size,
        max_seq_len=message.max_seq_len,
        takes_text=message.takes_text,
        variants=tuple(
            Variant(
                name=variant.name,
                inputs=tuple(variant.inputs),
                outputs=tuple(variant.outputs),
                providers=tuple(variant.providers),
                max_abs_error=variant.max_abs_error,
                tolerance=variant.tolerance,
                quadratic_memory=variant.quadratic_memory,
            )
            for variant in message.variants
        ),
        source=message.source,
        window_right=message.window_right if message.has_window_right else None,
        bottom_right=message.bottom_right,
        alibi=message.alibi,
        rotary=message.rotary,
        attentions=tuple(
            TransformerAttention(
                name=attention.name,
                num_layers=attention.num_layers,
                num_heads=attention.num_heads,
                num_kv_heads=attention.num_kv_heads,
                head_dim=attention.head_dim,
                mask=pb.MaskKind.Name(attention.mask).lower(),
                windows=tuple(attention.windows),
            )
            for attention in message.attentions
        ),
        manifest=manifest,
    )


def server_info_from(message: pb.ServerInfoResponse) -> ServerInfo:
    """A server's description."""
    limits = message.limits
    return ServerInfo(
        name=message.name,
        version=message.version,
        onnxruntime_version=message.onnxruntime_version,
        providers=tuple(message.providers),
        limits=Limits(
            **{field.name: getattr(limits, field.name) for field in limits.DESCRIPTOR.fields}
        ),
        state=message.state,
    )


def timings_from(message: pb.Timings) -> Timings:
    """The timings of an answer."""
    return Timings(
        deserialize=message.deserialize,
        queue=message.queue,
        compute=message.compute,
        serialize=message.serialize,
        batch_size=message.batch_size,
    )
