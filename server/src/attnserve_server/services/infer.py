"""One inference of the Open Inference Protocol: decode, call, encode."""

import time
from dataclasses import dataclass
from functools import partial

from attnserve_proto import inference_wire
from attnserve_proto.inference import open_inference_pb2 as oip
from attnserve_proto.layouts import Layouts

from attnserve_server import validation
from attnserve_server.dtypes import Array
from attnserve_server.engine.models import LoadedModel
from attnserve_server.scheduler import Ticket
from attnserve_server.services import inputs
from attnserve_server.services.runtime import Runtime
from attnserve_server.statistics import Statistics
from attnserve_server.validation import AttendPlan
from attnserve_server.validation import inference as checks
from attnserve_server.wire import inference as wire
from attnserve_server.wire import tensors
from attnserve_server.wire.answers import Clock
from attnserve_server.wire.inference import Output, SharedView
from attnserve_server.wire.tensors import Region, TensorSpec


@dataclass(frozen=True, slots=True)
class _Done:
    """A computation that ended: its arrays by output name.

    `plan` is None for token models.
    """

    variant: str
    arrays: dict[str, Array]
    sequences: int
    clock: Clock
    plan: AttendPlan | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    """A request that was answered, but for its elements: another one like it is answered alike.

    Attributes:
        generation: of the model store that it was checked against.
        inputs: names, in the order of the contents.
        outputs: names, in the order of the answer.
        response: the answer but for its contents, serialised.
        timeout: microseconds; 0: none.
    """

    generation: int
    plan: AttendPlan
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    response: bytes
    timeout: int


class Inference:
    """Runs requests, whichever method they came by, and counts them by model.

    Args:
        runtime: what requests need.
        statistics: where to count.
    """

    def __init__(self, runtime: Runtime, statistics: Statistics) -> None:
        self._runtime = runtime
        self._statistics = statistics
        self._generation = 0
        self._known: Layouts[_Known] = Layouts()

    def answer_once(self, request: bytes, peer: str, ticket: Ticket, arrived: int) -> bytes:
        """Answer one request, both serialised; arguments and errors as those of `answer`.

        Callers send the same request again and again with other elements: it is checked once.
        """
        generation = self._runtime.store.generation
        if generation != self._generation:
            # Else what was remembered would keep unloaded models in memory.
            self._known.forget()
            self._generation = generation
        found = self._known.find(request)
        if found is not None and found[0].generation == generation:
            return self._answer_known(*found, ticket, arrived)
        message, rooms = inference_wire.locate(request)
        view = memoryview(request)
        raw = [view[start:end] for start, end in rooms]
        response, contents, done = self._answer(message, raw, peer, ticket, arrived)
        serialised = response.SerializeToString()
        plan = done.plan
        in_message = all(output.name in done.arrays for output in message.outputs)
        plain = len(raw) == len(message.inputs) and not any(o.parameters for o in message.outputs)
        if plan is not None and plain and in_message:
            known = _Known(
                generation,
                plan,
                tuple(tensor.name for tensor in message.inputs),
                tuple(tensor.name for tensor in response.outputs),
                serialised,
                checks.options(message).timeout,
            )
            places = {str(number): room for number, room in enumerate(rooms)}
            self._known.remember(request, places, known)
        return inference_wire.join_serialised(serialised, contents)

    def _answer_known(
        self, known: _Known, views: dict[str, memoryview], ticket: Ticket, arrived: int
    ) -> bytes:
        plan, runtime = known.plan, self._runtime
        name, version = plan.model.manifest.name, plan.model.manifest.version
        try:
            ticket.shorten(known.timeout / 1e6)
            ticket.priority = plan.priority
            given = dict(zip(known.inputs, views.values(), strict=True))
            arrays = {name: spec.array(given[name]) for name, spec in plan.specs.items()}
            results, clock = runtime.attend(validation.complete(plan, arrays), ticket, arrived)
        except Exception:
            self._statistics.failed(name, version, time.perf_counter_ns() - arrived)
            raise
        contents = [tensors.data(results[output]) for output in known.outputs]
        answer = inference_wire.join_serialised(known.response, contents)
        now = time.perf_counter_ns()
        self._statistics.answered(name, version, plan.dims.batch, clock, now)
        return answer

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
        response, contents, _ = self._answer(message, raw, peer, ticket, arrived)
        return response, contents

    def _answer(
        self,
        message: oip.ModelInferRequest,
        raw: list[memoryview],
        peer: str,
        ticket: Ticket,
        arrived: int,
    ) -> tuple[oip.ModelInferResponse, list[memoryview], _Done]:
        model = self._runtime.store.get(message.model_name, message.model_version)
        name, version = model.manifest.name, model.manifest.version
        try:
            shared = partial(_view, self._runtime, peer)
            asked = wire.outputs(message, shared) or [Output(_main_output(model), None, None)]
            done = self._compute(model, message, raw, shared, asked, ticket, arrived)
            limit = self._runtime.limits.max_message_bytes
            response, contents = wire.answer(
                message, model, done.variant, asked, done.arrays, limit
            )
        except Exception:
            self._statistics.failed(name, version, time.perf_counter_ns() - arrived)
            raise
        now = time.perf_counter_ns()
        self._statistics.answered(name, version, done.sequences, done.clock, now)
        return response, contents, done

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
        given_tensors = wire.inputs(message, raw, shared)
        given = checks.options(message)
        ticket.shorten(given.timeout / 1e6)
        runtime = self._runtime
        if model.manifest.transformer is not None:
            call = checks.tokens_call(model, given_tensors, asked, given, runtime.limits)
            tokens = validation.tokens_work(call.message, runtime.store, runtime.limits)
            ticket.priority = tokens.priority
            outputs, clock = runtime.attend_tokens(tokens, ticket, arrived)
            arrays = checks.padded(call, outputs)
            return _Done(tokens.variant.name, arrays, len(tokens.sequences), clock)
        header = checks.attend_request(model, given_tensors, asked, given)
        sizes = {name: tensor.elements.nbytes for name, tensor in given_tensors.items()}
        plan = validation.plan(header, sizes, runtime.store, runtime.limits, chunks_allowed=False)
        if all(output.place is None for output in asked):
            wire.check_answer_size(plan.response_bytes, runtime.limits.max_message_bytes)
        arrays = {name: _array(spec, given_tensors[name]) for name, spec in plan.specs.items()}
        work = validation.complete(plan, arrays, _into(plan, asked))
        ticket.priority = plan.priority
        arrays, clock = runtime.attend(work, ticket, arrived)
        return _Done(work.variant.name, arrays, work.dims.batch, clock, plan)


def _into(plan: AttendPlan, asked: list[Output]) -> dict[str, Array]:
    """Where results go that are wanted in shared memory, and fit there."""
    places = {output.name: output.place for output in asked if output.place is not None}
    return {
        spec.name: spec.view(places[spec.name][: spec.byte_size])
        for spec in plan.results
        if spec.name in places and places[spec.name].nbytes >= spec.byte_size
    }


def _main_output(model: LoadedModel) -> str:
    return "output" if model.manifest.transformer is None else "last_hidden_state"


def _array(spec: TensorSpec, tensor: wire.InputTensor) -> Array:
    if tensor.shared:
        return inputs.shared_array(spec, tensor.elements)
    return spec.array(tensor.elements)


def _view(runtime: Runtime, peer: str, region: str, offset: int, byte_size: int) -> memoryview:
    return inputs.view(Region(region, offset, byte_size), runtime, peer)
