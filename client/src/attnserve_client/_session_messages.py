"""Messages of Decode, but for those of layers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Required, TypedDict

from attnserve_proto import attention_pb2 as pb
from attnserve_proto import encoding
from google.protobuf.message import DecodeError

from attnserve_client import _errors
from attnserve_client._results import SessionLayer

METHOD = "Decode"
HASH_BYTES = 32

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
) -> pb.OpenSessions:
    """Build an opening of `count` equal sessions; the others as `SessionOptions` has them.

    Raises:
        ValueError: `cache_dtype` is none that there is, or a hash is not of 32 bytes.
    """
    if cache_dtype not in CACHE_TYPES:
        allowed = ", ".join(name for name in CACHE_TYPES if name)
        raise ValueError(f"cache_dtype: {cache_dtype!r}; allowed: {allowed}, or None: as the model")
    if num_layers and layer_models and num_layers != len(layer_models):
        raise ValueError(
            f"num_layers: {num_layers} beside {len(layer_models)} layer_models; allowed: one"
        )
    new = pb.NewSession(
        max_tokens=max_tokens,
        reserved_tokens=reserved_tokens,
        cross_tokens=cross_tokens,
        prefix_hashes=joined_hashes(prefix_hashes),
    )
    return pb.OpenSessions(
        model=model,
        version=str(version),
        num_layers=num_layers or len(layer_models),
        layers=[
            pb.LayerSpec(
                window=layer.window,
                kept_first=layer.kept_first,
                cross=layer.cross,
                latent=layer.latent,
            )
            for layer in layers or ()
        ],
        cache_type=CACHE_TYPES[cache_dtype],
        lease=microseconds(lease),
        sessions=[new] * count,
        layer_models=[_model_of_layer(each) for each in layer_models],
    )


def _model_of_layer(given: str | tuple[str, str | int]) -> pb.ModelOfLayer:
    name, version = (given, "") if isinstance(given, str) else given
    return pb.ModelOfLayer(model=name, version=str(version))


def joined_hashes(hashes: Iterable[bytes]) -> bytes:
    """Hashes of pages as they travel.

    Raises:
        ValueError: one is not of 32 bytes.
    """
    each = list(hashes)
    for one in each:
        if len(one) != HASH_BYTES:
            raise ValueError(f"prefix_hashes: one of {len(one)} bytes; allowed: {HASH_BYTES}")
    return b"".join(each)


def import_messages(
    request_id: int,
    chunks: Iterator[bytes],
    max_tokens: int,
    reserved_tokens: int,
    lease: float | None,
) -> Iterator[bytes]:
    """The requests of an import. `chunks`: what an export gave."""
    index, data = 0, next(chunks)
    while True:
        following = next(chunks, None)
        request = pb.ImportSession(
            chunk=pb.SessionChunk(index=index, data=data, last=following is None)
        )
        if index == 0:
            request.max_tokens = max_tokens
            request.reserved_tokens = reserved_tokens
            request.lease = microseconds(lease)
        message = pb.DecodeRequest(request_id=request_id, import_session=request)
        yield message.SerializeToString()
        if following is None:
            return
        index, data = index + 1, following


def microseconds(lease: float | None) -> int:
    """A lease as it travels; None: the server's default."""
    return round((lease or 0) * 1e6)
