"""Messages of Decode, but for those of layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Required, TypedDict

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import encoding
from google.protobuf.message import DecodeError

from attnserve_client import _arguments as arguments
from attnserve_client import _errors, _tensors
from attnserve_client._results import SessionLayer

METHOD = "Decode"
HASH_BYTES = 32
# As attention.proto has it; a message holds some bytes of each session that it opens.
MOST_LAYERS, MOST_TOKENS, MOST_SESSIONS = 1024, 1 << 24, 1 << 16

CACHE_TYPES: "Mapping[str | None, pb.CacheType.ValueType]" = {
    None: pb.CACHE_AS_MODEL,
    "fp32": pb.CACHE_FP32,
    "fp16": pb.CACHE_FP16,
    "bf16": pb.CACHE_BF16,
    "int8": pb.CACHE_INT8,
    "fp8": pb.CACHE_FP8,
}

_REQUEST_ID = pb.DecodeRequest.REQUEST_ID_FIELD_NUMBER
_ID_TAG = encoding.tag(_REQUEST_ID, 0)


def request_id_of(received: bytes) -> int:
    """Which request a `DecodeResponse` answers.

    Raises:
        DecodeError: it is none.
    """
    view = memoryview(received)
    if received[:1] == _ID_TAG:
        return encoding.read_varint(view, 1)[0]
    found = 0
    for number, start, inside, _ in encoding.fields(view):
        if number == _REQUEST_ID and inside == start:
            found, _ = encoding.read_varint(view, encoding.skip_varint(view, start))
    return found


def read(received: bytes) -> pb.DecodeResponse:
    """An answer.

    Raises:
        AttnserveError: that it says.
        InternalError: it is no `DecodeResponse`.
    """
    try:
        response = pb.DecodeResponse.FromString(received)
    except DecodeError as error:
        raise _errors.InternalError(f"cannot be read: {error}", method=METHOD) from None
    if response.WhichOneof("result") == "error":
        raise _errors.from_stream_error(response.error, METHOD)
    return response


def moved_in(received: bytes) -> pb.MovedSession | None:
    """What an answer to no request says of a session that has moved; None: nothing."""
    response = pb.DecodeResponse.FromString(received)
    return response.moved if response.HasField("moved") else None


def making(request: pb.DecodeRequest) -> Callable[[int], bytes]:
    """What makes the message of a request, given its id."""

    def make(request_id: int) -> bytes:
        request.request_id = request_id
        return request.SerializeToString()

    return make


class SessionOptions(TypedDict, total=False):
    """What sessions are opened with.

    Attributes:
        num_layers: of the caller's model, each with a cache of its own; not with `layer_models`.
        max_tokens: the most that each may hold.
        version: of the model; empty is the highest.
        layer_models: instead of a model: a layer model with the variant `paged` for each layer, by
            its name, or name and version.
        layers: what each layer sees; one: for all; None: each as the model.
        cache_dtype: "fp32", "fp16", "bf16", "int8" or "fp8"; None is as the model.
        reserved_tokens: tokens that room is promised for; 0: max_tokens.
        cross_tokens: the most keys of cross layers.
        prefix_hashes: of the pages of tokens that it begins with (`page_hashes`): what the server
            still has of them is there from the start, as the session's `length` says.
        lease: seconds that it is kept after its last use; None is the server's default.
        shards: how one session is laid over several servers; None: it is at one.
    """

    num_layers: int
    max_tokens: Required[int]
    version: str | int
    layer_models: Sequence[str | tuple[str, str | int]]
    layers: Sequence[SessionLayer] | None
    cache_dtype: str | None
    reserved_tokens: int
    cross_tokens: int
    prefix_hashes: Iterable[bytes]
    lease: float | None
    shards: Any


def open_sessions(
    count: int,
    model: str,
    *,
    max_tokens: int,
    num_layers: int = 0,
    version: str | int = "",
    layer_models: Sequence[str | tuple[str, str | int]] = (),
    layers: Sequence[SessionLayer] | None = None,
    cache_dtype: str | None = None,
    reserved_tokens: int = 0,
    cross_tokens: int = 0,
    prefix_hashes: Iterable[bytes] = (),
    lease: float | None = None,
    shards: Any = None,
) -> pb.OpenSessions:
    """Build an opening of `count` equal sessions; the others as `SessionOptions` has them.

    Raises:
        ValueError: `cache_dtype` is none that there is, or a hash is not of 32 bytes.
    """
    if shards is not None:
        raise arguments.refused(
            "shards", shards, "None, but by `session` of a client of several servers"
        )
    arguments.one_of("cache_dtype", cache_dtype, CACHE_TYPES, ", or None: as the model")
    count = arguments.integer("count", count, 1, MOST_SESSIONS)
    models = _models_of_layers(layer_models)
    if models and (num_layers not in (0, len(models)) or model):
        raise ValueError(
            f"layer_models: {len(models)} beside model {model!r} and num_layers {num_layers}; "
            "allowed: without model, and num_layers as many or left out"
        )
    new = pb.NewSession(
        max_tokens=arguments.integer("max_tokens", max_tokens, 1, MOST_TOKENS),
        reserved_tokens=arguments.integer("reserved_tokens", reserved_tokens, 0, MOST_TOKENS),
        cross_tokens=arguments.integer("cross_tokens", cross_tokens, 0, MOST_TOKENS),
        prefix_hashes=joined_hashes("prefix_hashes", prefix_hashes),
    )
    return pb.OpenSessions(
        model=arguments.text("model", model, empty=len(models) > 0),
        version=arguments.version("version", version),
        num_layers=len(models) or arguments.integer("num_layers", num_layers, 1, MOST_LAYERS),
        layers=_specs(layers),
        cache_type=CACHE_TYPES[cache_dtype],
        lease=arguments.microseconds("lease", lease),
        sessions=[new] * count,
        layer_models=models,
    )


def _specs(layers: Sequence[SessionLayer] | None) -> list[pb.LayerSpec]:
    specs = []
    allowed = "a list of SessionLayer, or None: each as the model"
    given = () if layers is None else layers
    for index, layer in enumerate(arguments.items("layers", given, allowed)):
        name = f"layers[{index}]"
        arguments.kind(name, layer, SessionLayer, "a SessionLayer")
        window = layer.window
        specs.append(
            pb.LayerSpec(
                window=None if window is None else arguments.integer(f"{name}.window", window),
                kept_first=arguments.integer(f"{name}.kept_first", layer.kept_first),
                cross=arguments.flag(f"{name}.cross", layer.cross),
                latent=arguments.flag(f"{name}.latent", layer.latent),
                sinks=_sinks(f"{name}.sinks", layer.sinks),
            )
        )
    return specs


def _sinks(name: str, given: Any) -> list[float]:
    if given is None:
        return []
    array = _tensors.as_array(given, name)
    if array.ndim != 1:
        raise ValueError(
            f"{name}: given shape {list(array.shape)}; allowed: [H], one for each head"
        )
    sinks: list[float] = array.astype(np.float32).tolist()
    return sinks


def _models_of_layers(given: Sequence[str | tuple[str, str | int]]) -> list[pb.ModelOfLayer]:
    models = []
    allowed = "a list of names, or of (name, version)"
    for index, each in enumerate(arguments.items("layer_models", given, allowed)):
        name = f"layer_models[{index}]"
        pair = (each, "") if isinstance(each, str) else each
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise arguments.mistyped(name, each, "a name, or (name, version)")
        model = arguments.text(name, pair[0], empty=False)
        models.append(pb.ModelOfLayer(model=model, version=arguments.version(name, pair[1])))
    return models


def joined_hashes(name: str, hashes: Iterable[bytes]) -> bytes:
    """Hashes of pages as they travel.

    Raises:
        ValueError: one is not of 32 bytes.
    """
    allowed = f"a list of hashes, each of {HASH_BYTES} bytes"
    each = arguments.items(name, hashes, allowed)
    for one in each:
        arguments.kind(name, one, (bytes, bytearray, memoryview), allowed)
        if len(one) != HASH_BYTES:
            raise ValueError(f"{name}: one of {len(one)} bytes; allowed: {HASH_BYTES}")
    return b"".join(each)


def import_messages(
    request_id: int,
    chunks: Iterator[bytes],
    max_tokens: int,
    reserved_tokens: int,
    lease: int,
) -> Iterator[bytes]:
    """The requests of an import. `chunks`: what an export gave; `lease`: as it travels."""
    index, data = 0, next(chunks)
    while True:
        following = next(chunks, None)
        request = pb.ImportSession(
            chunk=pb.SessionChunk(index=index, data=data, last=following is None)
        )
        if index == 0:
            request.max_tokens = max_tokens
            request.reserved_tokens = reserved_tokens
            request.lease = lease
        message = pb.DecodeRequest(request_id=request_id, import_session=request)
        yield message.SerializeToString()
        if following is None:
            return
        index, data = index + 1, following
