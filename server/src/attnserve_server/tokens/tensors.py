"""Checks of tensors that are read in the place of token ids."""

import math
from collections.abc import Sequence

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto.manifest import STATES, ModelInput, Transformer

from attnserve_server import dtypes
from attnserve_server.dtypes import Array
from attnserve_server.errors import InvalidRequestError, PreconditionError
from attnserve_server.models.store import LoadedModel
from attnserve_server.settings import Limits
from attnserve_server.tokens.bounds import check_batch, max_len
from attnserve_server.tokens.work import TensorBatch

# BF16 is not among NumPy's types: its bits.
_ELEMENTS = {"FP32": "<f4", "FP16": "<f2", "BF16": "<u2"}
_BF16_EXPONENT = 0x7F80


def tensor_batch(
    tensors: Sequence[pb.InputTensor], model: LoadedModel, transformer: Transformer, limits: Limits
) -> TensorBatch:
    """What a request gives in the place of token ids.

    Raises:
        RequestError: with the field, what was given and what is allowed.
    """
    if not transformer.inputs:
        raise PreconditionError(
            f"tensors: model {model.manifest.name} takes text or tokens and no tensors"
        )
    allowed = ", ".join(entry.name for entry in transformer.inputs)
    if len(tensors) > 1:
        raise InvalidRequestError.of("tensors", f"{len(tensors)} of them", f"one of {allowed}")
    given = tensors[0]
    entry = transformer.input(given.name)
    if entry is None:
        raise InvalidRequestError.of("tensors[0].name", repr(given.name[:80]), allowed)
    return _checked(given, entry, transformer, limits)


def _checked(
    given: pb.InputTensor, entry: ModelInput, transformer: Transformer, limits: Limits
) -> TensorBatch:
    tensor, field = given.tensor, f"tensors[0].tensor ({entry.name})"
    if tensor.dtype != dtypes.number_of(entry.dtype):
        raise InvalidRequestError.of(f"{field}.dtype", dtypes.name_of(tensor.dtype), entry.dtype)
    shape = tuple(tensor.shape)
    wanted = ", ".join("S" if isinstance(size, str) else str(size) for size in entry.shape)
    fits = len(shape) == 1 + len(entry.shape) and all(
        size == at if isinstance(size, int) else at >= 1
        for size, at in zip(entry.shape, shape[1:], strict=True)
    )
    if not fits:
        raise InvalidRequestError.of(f"{field}.shape", list(shape), f"[B, {wanted}]")
    check_batch(f"{field}.shape", shape[0], limits)
    placed = entry.tokens is None and entry.name != STATES
    most = max_len(transformer, limits) if placed else limits.max_seq_len
    longest = shape[1] if entry.tokens is None else entry.tokens
    if longest > most:
        raise InvalidRequestError.of(f"{field}.shape", f"{longest} tokens", f"1..{most} tokens")
    array = _elements(tensor, field, entry.dtype, shape)
    return TensorBatch(entry, array, _lengths(given, entry, shape))


def _elements(tensor: pb.Tensor, field: str, dtype: str, shape: tuple[int, ...]) -> Array:
    kind = tensor.WhichOneof("content")
    if kind != "data":
        raise InvalidRequestError.of(
            field, kind or "no content", "the elements themselves, as `data`"
        )
    kept = np.dtype(_ELEMENTS[dtype])
    wanted = math.prod(shape) * kept.itemsize
    if len(tensor.data) != wanted:
        raise InvalidRequestError.of(
            f"{field}.data",
            f"{len(tensor.data)} bytes",
            f"{wanted} bytes, as shape {list(shape)} takes",
        )
    array = np.frombuffer(tensor.data, kept).reshape(shape)
    bits = dtype == "BF16"
    finite = (array & _BF16_EXPONENT) != _BF16_EXPONENT if bits else np.isfinite(array)
    if not finite.all():
        place = [int(index) for index in np.argwhere(~finite)[0]]
        found = "NaN or infinity" if bits else array[tuple(place)]
        raise InvalidRequestError.of(f"{field}{place}", found, "finite numbers")
    return array


def _lengths(given: pb.InputTensor, entry: ModelInput, shape: tuple[int, ...]) -> Sequence[int]:
    """Tokens of each sequence."""
    if entry.tokens is not None:
        if given.lengths:
            raise InvalidRequestError.of(
                "tensors[0].lengths",
                f"{len(given.lengths)} of them",
                f"none: {entry.name} has no padding",
            )
        return [entry.tokens] * shape[0]
    if not given.lengths:
        return [shape[1]] * shape[0]
    if len(given.lengths) != shape[0]:
        raise InvalidRequestError.of(
            "tensors[0].lengths",
            f"{len(given.lengths)} of them",
            f"{shape[0]}, one for each sequence",
        )
    for row, length in enumerate(given.lengths):
        if not 1 <= length <= shape[1]:
            raise InvalidRequestError.of(f"tensors[0].lengths[{row}]", length, f"1..{shape[1]}")
    return list(given.lengths)
