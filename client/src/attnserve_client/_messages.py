"""Requests from arguments and results from answers, of all methods but `attend`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Required, TypedDict

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import wire

from attnserve_client import _answers, _tensors
from attnserve_client import _arguments as arguments
from attnserve_client import _token_batches as token_batches
from attnserve_client._results import (
    Array,
    Limits,
    Model,
    ModelInput,
    Patches,
    ServerInfo,
    StoredTensor,
    TokensResult,
    TransformerAttention,
    UnavailableModel,
    Variant,
)

# Texts, pairs of texts, ids, and what a tokenizer of transformers gives.
Tokens = (
    Sequence[str] | Sequence[tuple[str, str]] | Sequence[Sequence[int]] | Array | Mapping[str, Any]
)

# Tensors of which sequences may have several lengths.
RAGGED = ("inputs_embeds", "encoder_hidden_states")


def put_messages(array: Array, lease: int, chunk_bytes: int) -> Iterator[bytes]:
    """The messages of PutTensor: the header, then the elements in chunks; `lease` as it travels."""
    tensor = _tensors.header(array.dtype, array.shape)
    tensor.chunked.byte_size = array.nbytes
    header = pb.PutTensorHeader(tensor=tensor, lease=lease)
    yield pb.PutTensorRequest(header=header).SerializeToString()
    view = _tensors.data(array)
    for offset in range(0, view.nbytes, chunk_bytes):
        yield wire.encode_put_chunk(wire.Chunk(0, 0, offset, view[offset : offset + chunk_bytes]))


def stored_from(
    answer: pb.StoredTensor,
    shape: tuple[int, ...],
    dtype: "np.dtype[Any]",
    integers: Array | None = None,
) -> StoredTensor:
    """What the server keeps."""
    return StoredTensor(answer.handle, answer.lease / 1e6, shape, dtype, integers=integers)


def kept_integers(array: Array) -> Array | None:
    """A copy of integers, which are few; None of other tensors."""
    return array.copy() if array.dtype.kind == "i" else None


class TokensOptions(TypedDict, total=False):
    """What `attend_tokens` takes by name.

    Attributes:
        model: its name.
        version: empty is the highest.
        variant: force one; empty lets the server pick.
        token_type_ids: of ids: what kind of token each is, a list for each sequence; None is what
            the inputs say, if a tokenizer of transformers gave them, or else 0.
        targets: for models with a decoder beside a source, what it reads: a list of texts, or of id
            sequences (start token included), one for each of the inputs; None is the start token
            alone.
        attention: "encoder", "decoder" or "cross"; empty is the first that the model has.
        layers: 0-based, for weights and all that is said of them; None is all.
        heads: 0-based, likewise; None is all.
        return_hidden: send the hidden states back; they are, unless this is False.
        return_pooled: also one vector per sequence.
        return_weights: also the attention weights of `layers` and `heads`; None asks for them
            exactly if `layers` or `heads` is given and nothing is asked of the weights (the four
            below).
        return_entropy: also the entropy of each query's weights, nats.
        return_effective_context: also its exponential: over how many keys the weights of each
            query are spread.
        mass_by_distance: also the weight given at each distance between query and key, for this
            many distances; the last one gathers all beyond.
        mass_on_first: also the weight that each query gives to this many first keys.
        truncate: whether texts that are too long are cut, of a pair the longer one first, or
            refused; None is as the model's checkpoint has it: those of sentence-transformers cut.
        pixel_values: [B, channels, height, width], in the place of texts and ids: pictures, made
            ready as the model was trained (`attnserve_client.transformers.attend_images` does so).
        input_features: [B, mel bins, frames], likewise: sounds.
        inputs_embeds: [B, S, E], likewise: token embeddings; or a list of [S, E] of any lengths.
        encoder_hidden_states: [B, S, E], likewise, or such a list: what some encoder has made, for
            a decoder to attend to that was exported without one.
    """

    model: Required[str]
    version: str | int
    variant: str
    token_type_ids: Sequence[Sequence[int]] | Array | None
    targets: Tokens | None
    attention: str
    layers: Sequence[int] | None
    heads: Sequence[int] | None
    return_hidden: bool
    return_pooled: bool
    return_weights: bool | None
    return_entropy: bool
    return_effective_context: bool
    mass_by_distance: int
    mass_on_first: int
    truncate: bool | None
    pixel_values: Any
    input_features: Any
    inputs_embeds: Any
    encoder_hidden_states: Any


def tokens_request(
    inputs: Tokens | None = None,
    *,
    model: str,
    version: str | int = "",
    variant: str = "",
    token_type_ids: Sequence[Sequence[int]] | Array | None = None,
    targets: Tokens | None = None,
    attention: str = "",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    return_hidden: bool = True,
    return_pooled: bool = False,
    return_weights: bool | None = None,
    return_entropy: bool = False,
    return_effective_context: bool = False,
    mass_by_distance: int = 0,
    mass_on_first: int = 0,
    truncate: bool | None = None,
    pixel_values: Any = None,
    input_features: Any = None,
    inputs_embeds: Any = None,
    encoder_hidden_states: Any = None,
) -> pb.AttendTokensRequest:
    """Build a request from the arguments of `attend_tokens`."""
    tensors = {
        "pixel_values": pixel_values,
        "input_features": input_features,
        "inputs_embeds": inputs_embeds,
        "encoder_hidden_states": encoder_hidden_states,
    }
    given_tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if isinstance(inputs, Mapping) and "input_ids" not in inputs:  # of transformers' processors
        given_tensors |= {name: inputs[name] for name in tensors if name in inputs}
        if given_tensors:
            inputs = None
    truncate = None if truncate is None else arguments.flag("truncate", truncate)
    request = pb.AttendTokensRequest(
        model=arguments.text("model", model, empty=False),
        version=arguments.version("version", version),
        variant=arguments.text("variant", variant),
    )
    if (inputs is None) != (len(given_tensors) == 1):
        names = ["inputs"] * (inputs is not None) + list(given_tensors)
        raise TypeError(
            f"given {' and '.join(names) or 'nothing to read'}; allowed: one of inputs, "
            f"{', '.join(tensors)}"
        )
    if inputs is None and token_type_ids is not None:
        raise ValueError(
            f"token_type_ids: given with {min(given_tensors)}; allowed: with id sequences"
        )
    for name, tensor in given_tensors.items():
        request.tensors.append(_tensor_input(name, tensor))
    if inputs is not None:
        given = token_batches.batch("inputs", inputs, truncate, token_type_ids)
        if isinstance(given, pb.TextBatch):
            request.text.CopyFrom(given)
        else:
            request.tokens.CopyFrom(given)
    if targets is not None:
        target = token_batches.batch("targets", targets, truncate)
        if isinstance(target, pb.TextBatch):
            request.target_text.CopyFrom(target)
        else:
            request.target_tokens.CopyFrom(target)
    returns = pb.TokenReturnOptions(
        no_hidden=not arguments.flag("return_hidden", return_hidden),
        pooled=arguments.flag("return_pooled", return_pooled),
        entropy=arguments.flag("return_entropy", return_entropy),
        attention=arguments.text("attention", attention),
        layers=_indices("layers", layers),
        heads=_indices("heads", heads),
        effective_context=arguments.flag("return_effective_context", return_effective_context),
        mass_by_distance=arguments.integer("mass_by_distance", mass_by_distance),
        mass_on_first=arguments.integer("mass_on_first", mass_on_first),
    )
    if return_weights is None:
        said = return_entropy or return_effective_context or mass_by_distance or mass_on_first
        returns.weights = not said and (layers is not None or heads is not None)
    else:
        returns.weights = arguments.flag("return_weights", return_weights)
    request.returns.CopyFrom(returns)
    return request


def _tensor_input(name: str, given: Any) -> pb.InputTensor:
    """A tensor that is read in the place of ids; a list of arrays of several lengths is padded."""
    lengths: list[int] = []
    if isinstance(given, list | tuple) and given and all(np.ndim(each) == 2 for each in given):
        rows = [_tensors.as_array(each, f"{name}[{row}]") for row, each in enumerate(given)]
        if name in RAGGED:
            lengths = [len(row) for row in rows]
            given = _padded(name, rows)
    array = _tensors.as_array(given, name)
    message = pb.InputTensor(name=name, lengths=lengths)
    message.tensor.CopyFrom(_tensors.header(array.dtype, array.shape))
    message.tensor.data = bytes(_tensors.data(array))
    return message


def _padded(name: str, rows: Sequence[Array]) -> Array:
    """[S, E] each to [B, S, E], 0 behind the shorter ones."""
    kinds = {(row.dtype, row.shape[1]) for row in rows}
    if len(kinds) > 1:
        shown = " and ".join(sorted(f"[S, {width}] {dtype}" for dtype, width in kinds))
        raise ValueError(f"{name}: given {shown}; allowed: of one width and dtype")
    whole = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), rows[0].dtype)
    for row, each in zip(whole, rows, strict=True):
        row[: len(each)] = each
    return whole


def _indices(name: str, given: Sequence[int] | None) -> list[int]:
    """Layers or heads; none stand for all."""
    if given is None:
        return []
    indices = arguments.integers(name, given, also=", or None: all")
    if not indices:
        raise arguments.refused(name, given, "one or more, or None: all")
    return indices


def tokens_result(
    response: pb.AttendTokensResponse, request: pb.AttendTokensRequest
) -> TokensResult:
    """The result of an answer to a request."""

    def arrays(name: str) -> list[Array] | None:
        if not response.sequences or not response.sequences[0].HasField(name):  # type: ignore[arg-type]
            return None
        tensors = [getattr(sequence, name) for sequence in response.sequences]
        return [_tensors.copy_of(tensor, tensor.data) for tensor in tensors]

    return TokensResult(
        model=response.model,
        version=response.version,
        variant=response.variant,
        timings=_answers.timings_from(response.timings),
        ids=[list(sequence.ids) for sequence in response.sequences],
        token_type_ids=[
            list(sequence.token_type_ids) or [0] * len(sequence.ids)
            for sequence in response.sequences
        ],
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
        lengths=[sequence.length or len(sequence.ids) for sequence in response.sequences],
        source=_input_from(response.source) if response.HasField("source") else None,
        given=next((_tensors.copy_of(e.tensor, e.tensor.data) for e in request.tensors), None),
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
        max_text_len=message.max_text_len or message.max_seq_len,
        token_types=message.token_types,
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
        chunk=message.chunk,
        sinks=tuple(message.sinks),
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
        takes_ids=message.takes_ids,
        inputs=tuple(map(_input_from, message.inputs)),
        manifest=manifest,
    )


def _input_from(message: pb.ModelInput) -> ModelInput:
    patches = message.patches
    return ModelInput(
        name=message.name,
        dtype=_tensors.dtype_name(message.dtype),
        shape=tuple(None if size < 0 else size for size in message.shape),
        tokens=message.tokens or None,
        patches=Patches(patches.first, patches.rows, patches.columns)
        if message.HasField("patches")
        else None,
        frames_per_token=message.frames_per_token or None,
        preprocessor=json.loads(message.preprocessor_json) if message.preprocessor_json else None,
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
        unavailable=tuple(
            UnavailableModel(model.name, model.version, model.reason)
            for model in message.unavailable
        ),
    )
