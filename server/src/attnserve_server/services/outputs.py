"""Where the tensors of an answer go."""

from attnserve_server import validation
from attnserve_server.services import inputs
from attnserve_server.services.runtime import Runtime
from attnserve_server.validation import AttendPlan
from attnserve_server.wire import unary
from attnserve_server.wire.unary import Answer, MessageFrame, SharedFrame

Frame = MessageFrame | SharedFrame


def frame(plan: AttendPlan) -> Frame:
    """An answer to a request, laid out but for its elements and timings."""
    model, variant, results = plan.model, plan.variant.name, plan.results
    if plan.output_region is None:
        return unary.message_frame(model, variant, results)
    starts = validation.offsets(results)[:-1]
    return unary.shared_frame(model, variant, results, plan.output_region, starts)


def begin(prepared: Frame, runtime: Runtime, peer: str) -> Answer:
    """Make room for the tensors of one answer.

    Args:
        prepared: as `frame` gives it.
        runtime: that has the caller's shared memory.
        peer: the caller, as grpc says.

    Raises:
        NotFoundError, ForbiddenError, InvalidRequestError: the caller's region cannot be used.
    """
    if isinstance(prepared, MessageFrame):
        return prepared.begin()
    return prepared.begin(inputs.view(prepared.region, runtime, peer))
