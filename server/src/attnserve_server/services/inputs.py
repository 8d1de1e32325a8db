"""Where the elements of a request's tensors come from."""

from collections.abc import Mapping

from attnserve_server.dtypes import Array
from attnserve_server.services.runtime import Runtime
from attnserve_server.validation import AttendPlan
from attnserve_server.wire.tensors import TensorSpec


def arrays(plan: AttendPlan, views: Mapping[str, memoryview], runtime: Runtime) -> dict[str, Array]:
    """The tensors of a request but for those that follow in chunks.

    Args:
        plan: the request.
        views: the elements that came with it, by field name.
        runtime: that keeps the others.

    Raises:
        NotFoundError: a kept tensor is there no more.
    """
    return {
        name: array(spec, views, runtime) for name, spec in plan.specs.items() if not spec.chunked
    }


def array(spec: TensorSpec, views: Mapping[str, memoryview], runtime: Runtime) -> Array:
    """One tensor; see `arrays`."""
    if spec.stored:
        return runtime.kept.get(spec.stored, f"{spec.name}.stored")
    return spec.array(views[spec.name])
