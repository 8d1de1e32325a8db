"""What a request takes and what its answer will hold."""

import math
from collections.abc import Mapping, Sequence

from attnserve_proto import attention_pb2 as pb

from attnserve_server import dtypes
from attnserve_server.engine.memory import working_bytes
from attnserve_server.engine.models import LoadedModel, Variant
from attnserve_server.engine.providers import CUDA
from attnserve_server.engine.work import Dims, Wanted
from attnserve_server.errors import ExhaustedError, InvalidRequestError
from attnserve_server.scheduler.job import HIGH, LOW, NORMAL
from attnserve_server.settings import Limits
from attnserve_server.wire import tensors
from attnserve_server.wire.tensors import Region, TensorSpec


def priority(given: int) -> int:
    """A request's priority; 0 is NORMAL.

    Raises:
        InvalidRequestError: there is no such priority.
    """
    if given > LOW:
        raise InvalidRequestError.of(
            "priority", given, f"{HIGH} (high), {NORMAL} (normal), {LOW} (low), 0 (normal)"
        )
    return given or NORMAL


def results(
    model: LoadedModel, specs: Mapping[str, TensorSpec], dims: Dims, wanted: Wanted
) -> list[TensorSpec]:
    """The tensors of the answer, in the order of their field numbers."""
    own = dtypes.number_of(model.manifest.dtype)
    rows = (dims.batch, dims.num_heads, dims.query_len)
    if "query" in specs:
        output: tuple[int, ...] = (*rows, model.manifest.attention.value_head_dim)
    else:
        output = specs["hidden_states"].shape
    heaviest = (*rows, wanted.top_k)
    every: list[tuple[bool | int, str, int, tuple[int, ...]]] = [
        (wanted.output, "output", own, output),
        (wanted.weights, "weights", own, (*rows, dims.key_len)),
        (wanted.entropy, "entropy", pb.FP32, rows),
        (wanted.top_k, "top_k_indices", pb.INT64, heaviest),
        (wanted.top_k, "top_k_weights", pb.FP32, heaviest),
        (wanted.mass_per_key, "mass_per_key", pb.FP32, (*rows[:2], dims.key_len)),
        (
            wanted.mass_by_distance,
            "mass_by_distance",
            pb.FP32,
            (*rows[:2], wanted.mass_by_distance),
        ),
    ]
    return [
        TensorSpec(name, dtype, shape, math.prod(shape) * (dtypes.item_bytes(dtype) or 0))
        for asked, name, dtype, shape in every
        if asked
    ]


def offsets(specs: Sequence[TensorSpec], start: int = 0) -> list[int]:
    """Where tensors lie that follow one another from `start` on, and where the last one ends."""
    starts = []
    end = start
    for spec in specs:
        at = -(-end // tensors.REGION_ALIGNMENT) * tensors.REGION_ALIGNMENT
        starts.append(at)
        end = at + spec.byte_size
    return [*starts, end]


def output_region(message: pb.AttendRequest, specs: Sequence[TensorSpec]) -> Region | None:
    """Where the answer's tensors go; None: into the answer.

    Raises:
        InvalidRequestError: they do not fit there.
    """
    if not message.HasField("output_region"):
        return None
    region = tensors.region_of("output_region", message.output_region)
    needed = offsets(specs)[-1]
    if region.byte_size < needed:
        raise InvalidRequestError.of(
            "output_region.byte_size", region.byte_size, f"{needed} or more, for this answer"
        )
    return region


def check(what: str, given: int, allowed: int, option: str) -> None:
    """Compare the bytes of a request's or an answer's tensors with a limit.

    Raises:
        ExhaustedError: they are too many.
    """
    if given > allowed:
        raise ExhaustedError(
            f"{what} size: its tensors take {given} bytes; allowed: {allowed} ({option})"
        )


def working(
    model: LoadedModel, variant: Variant, dims: Dims, tensor_bytes: int, limits: Limits
) -> int:
    """Estimated memory that a variant takes while it runs.

    Raises:
        ExhaustedError: more than a request may take.
    """
    attention = model.manifest.attention
    needed = working_bytes(
        variant.entry,
        dims.batch,
        dims.num_heads,
        dims.query_len,
        dims.key_len,
        tensor_bytes,
        growing_blocks=model.provider == CUDA
        and attention.mask == "causal"
        and attention.window is None,
    )
    if needed > limits.max_working_bytes:
        raise ExhaustedError(
            f"lengths: B={dims.batch}, H={dims.num_heads}, Sq={dims.query_len}, "
            f"Sk={dims.key_len} would take about {needed} bytes of working memory with variant "
            f"{variant.name!r}; "
            f"allowed: {limits.max_working_bytes} (--max-working-mib)"
        )
    return needed
