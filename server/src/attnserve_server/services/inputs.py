"""Where the elements of a request's tensors come from."""

from collections.abc import Mapping

from attnserve_server.dtypes import Array
from attnserve_server.services.runtime import Runtime
from attnserve_server.shared_memory import owner_of
from attnserve_server.validation import AttendPlan
from attnserve_server.wire.tensors import Region, TensorSpec


def arrays(
    plan: AttendPlan, views: Mapping[str, memoryview], runtime: Runtime, peer: str
) -> dict[str, Array]:
    """The tensors of a request but for those that follow in chunks.

    Args:
        plan: the request.
        views: the elements that came with it, by field name.
        runtime: that keeps the others.
        peer: who sent it, as grpc says.

    Raises:
        NotFoundError: a kept tensor or a region is there no more.
        ForbiddenError: the caller may not use shared memory.
        InvalidRequestError: a tensor reaches beyond its region.
    """
    return {
        name: array(spec, views, runtime, peer)
        for name, spec in plan.specs.items()
        if not spec.chunked
    }


def array(spec: TensorSpec, views: Mapping[str, memoryview], runtime: Runtime, peer: str) -> Array:
    """One tensor; see `arrays`."""
    if spec.stored:
        return runtime.kept.get(spec.stored, f"{spec.name}.stored")
    if spec.region is not None:
        return shared_array(spec, view(spec.region, runtime, peer))
    return spec.array(views[spec.name])


def shared_array(spec: TensorSpec, elements: memoryview) -> Array:
    """A tensor whose elements lie in a caller's shared memory."""
    shared = spec.array(elements)
    # The kernels trust lengths that were checked; the caller's memory may change after that.
    return shared.copy() if spec.name == "key_lengths" else shared


def view(region: Region, runtime: Runtime, peer: str) -> memoryview:
    """Part of a caller's shared memory, writable; errors as those of `arrays`."""
    return runtime.regions.view(region.name, region.offset, region.byte_size, owner_of(peer))
