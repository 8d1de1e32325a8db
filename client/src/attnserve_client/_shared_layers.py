"""Layers of a step whose tensors, and whose answer's, lie in memory shared with the server."""

import math
from collections.abc import Mapping

import numpy as np
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _tensors
from attnserve_client._arena import ALIGNMENT, Arena
from attnserve_client._results import Array
from attnserve_client._session_layers import ANSWERED, Attended, Rows, layer_of
from attnserve_client._sharing import Placed, Sharing, region_of

# Layers whose tensors have fewer bytes travel within messages: they take less time so.
_LEAST_BYTES = 1 << 18


def answer_bytes(tensors: Mapping[str, Rows], returns: pb.LayerReturns) -> int | None:
    """Bytes for the answer's tensors, one after another, each aligned.

    None where messages take less time, and where that is not known beforehand: the weights' keys,
    the heads of a layer model, the output of a layer without values.
    """
    if sum(each.nbytes for each in tensors.values()) < _LEAST_BYTES or returns.weights_of:
        return None
    heads = returns.log_sum_exp or returns.entropy
    if "hidden_states" in tensors:
        return None if heads else tensors["hidden_states"].nbytes
    if "query" not in tensors or "value" not in tensors:
        return None
    query, value = tensors["query"], tensors["value"]
    rows = math.prod(query.shape[:2])
    sizes = (
        rows * value.shape[2] * query.parts[0].itemsize * (not returns.no_output),
        rows * 4 * returns.log_sum_exp,
        rows * 4 * returns.entropy,
    )
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def place(
    sharing: Sharing, arena: Arena, name: str, tensors: Mapping[str, Rows], answer: int
) -> Placed:
    """Place tensors in memory that the server knows by a name, packed.

    Raises:
        MemoryError: there is no room.
    """
    packed: dict[str, Array] = {}
    for field, rows in tensors.items():
        if len(rows.parts) == 1:
            packed[field] = rows.parts[0]
        else:
            packed[field] = arena.empty(rows.shape, rows.parts[0].dtype)
            np.concatenate(rows.parts, out=packed[field])
    return sharing.place(packed, answer, arena, name)


def message(request_id: int, step_id: int, layer: int, options: bytes, placed: Placed) -> bytes:
    """The request: `options` is what it has besides, as fields."""
    asked = pb.AttendLayer.FromString(options)
    asked.step_id, asked.layer = step_id, layer
    asked.output_region.CopyFrom(region_of(placed.region, placed.output))
    for field, dtype, shape, offset in placed.places:
        tensor = _tensors.header(dtype, shape)
        size = math.prod(shape) * dtype.itemsize
        tensor.shared_memory.CopyFrom(
            pb.SharedMemoryRegion(name=placed.region, offset=offset, byte_size=size)
        )
        getattr(asked, field).CopyFrom(tensor)
    return pb.DecodeRequest(request_id=request_id, attend_layer=asked).SerializeToString()


def read(received: bytes, placed: Placed) -> Attended:
    """An answer, whose arrays lie in shared memory, and keep it taken; errors as `layer_of`."""
    attended = layer_of(received)
    arrays = dict(attended.arrays)
    for name in ANSWERED.values():
        tensor: pb.Tensor = getattr(attended.message, name)
        if tensor.WhichOneof("content") == "shared_memory":
            shape, dtype = _tensors.kind(tensor)
            at = tensor.shared_memory.offset - placed.output.offset
            arrays[name] = np.ndarray(shape, dtype, placed.output.memory, at)
    return Attended(attended.message, arrays)
