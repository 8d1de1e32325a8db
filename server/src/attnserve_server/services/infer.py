"""One inference of the Open Inference Protocol: decode, call, encode."""

import time
from dataclasses import dataclass
from functools import partial

from attnserve_proto.inference import open_inference_pb2 as oip

from attnserve_server import validation
from attnserve_server.dtypes import Array
from attnserve_server.engine.models import LoadedModel
from attnserve_server.scheduler import Ticket
from attnserve_server.services.runtime import Runtime
from attnserve_server.shared_memory import SharedRegions, owner_of
from attnserve_server.statistics import Statistics
from attnserve_server.validation import inference as checks
from attnserve_server.wire import inference as wire
from attnserve_server.wire.answers import Clock
from attnserve_server.wire.inference import Output, SharedView
from attnserve_server.wire.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class _Done:
    """A computation that ended: its arrays by output name."""

    variant: str
    arrays: dict[str, Array]
    sequences: int
    clock: Clock


class Inference:
    """Runs requests, whichever method they came by, and counts them by model.

    Args:
        runtime: what requests need.
        statistics: where to count.
    """

    def __init__(self, runtime: Runtime, statistics: Statistics) -> None:
        self._runtime = runtime
        self._statistics = statistics

    def answer(
        self,
        message: oip.ModelInferRequest,
        raw: list[memoryview],
        peer: str,
        ticket: Ticket,
        arrived: int,
    ) -> tuple[oip.ModelInferResponse, list[memoryview]]:
        """Answer one request.

        Args:
            message: the request, its raw contents left out.
            raw: those.
            peer: who sent it, as grpc says.
            ticket: its stay in the scheduler, which its `timeout` may shorten.
            arrived: when it came, in nanoseconds of `time.perf_counter_ns`.

        Returns:
            The response, its raw contents left out, and those.

        Raises:
            RequestError: with the field, what was given and what is allowed.
        """
        model = self._runtime.store.get(message.model_name, message.model_version)
        name, version = model.manifest.name, model.manifest.version
        try:
            shared = partial(_view, self._runtime.regions, peer)
            asked = wire.outputs(message, shared) or [Output(_main_output(model), None, None)]
            done = self._compute(model, message, raw, shared, asked, ticket, arrived)
            limit = self._runtime.limits.max_message_bytes
            answer = wire.answer(message, model, done.variant, asked, done.arrays, limit)
        except Exception:
            self._statistics.failed(name, version, time.perf_counter_ns() - arrived)
            raise
        now = time.perf_counter_ns()
        self._statistics.answered(name, version, done.sequences, done.clock, now)
        return answer

    def _compute(
        self,
        model: LoadedModel,
        message: oip.ModelInferRequest,
        raw: list[memoryview],
        shared: SharedView,
        asked: list[Output],
        ticket: Ticket,
        arrived: int,
    ) -> _Done:
        tensors = wire.inputs(message, raw, shared)
        given = checks.options(message)
        if given.timeout:
            own = time.monotonic() + given.timeout / 1e6
            ticket.deadline = own if ticket.deadline is None else min(own, ticket.deadline)
        runtime = self._runtime
        if model.manifest.transformer is not None:
            call = checks.tokens_call(model, tensors, asked, given, runtime.limits)
            tokens = validation.tokens_work(call.message, runtime.store, runtime.limits)
            outputs, clock = runtime.attend_tokens(tokens, ticket, arrived)
            arrays = checks.padded(call, outputs)
            return _Done(tokens.variant.name, arrays, len(tokens.sequences), clock)
        header = checks.attend_request(model, tensors, asked, given)
        sizes = {name: tensor.elements.nbytes for name, tensor in tensors.items()}
        plan = validation.plan(header, sizes, runtime.store, runtime.limits, chunks_allowed=False)
        if all(output.place is None for output in asked):
            wire.check_answer_size(plan.response_bytes, runtime.limits.max_message_bytes)
        work = validation.complete(
            plan, {name: _array(spec, tensors[name]) for name, spec in plan.specs.items()}
        )
        arrays, clock = runtime.attend(work, ticket, arrived)
        return _Done(work.variant.name, arrays, work.dims.batch, clock)


def _main_output(model: LoadedModel) -> str:
    return "output" if model.manifest.transformer is None else "last_hidden_state"


def _array(spec: TensorSpec, tensor: wire.InputTensor) -> Array:
    elements = tensor.elements
    if tensor.shared and spec.name == "key_lengths":
        # The kernels trust lengths that were checked; the caller's memory may change after that.
        elements = memoryview(bytes(elements))
    return spec.array(elements)


def _view(
    regions: SharedRegions, peer: str, region: str, offset: int, byte_size: int
) -> memoryview:
    return regions.view(region, offset, byte_size, owner_of(peer))
