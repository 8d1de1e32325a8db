"""`attnserve.v1.AttentionService`: decode, call, encode."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import onnxruntime
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import wire
from attnserve_proto.layouts import Layouts

from attnserve_server import __version__, validation
from attnserve_server.errors import ExhaustedError, InvalidRequestError, UnimplementedError
from attnserve_server.services import inputs, outputs
from attnserve_server.services.answering import answering, answering_at_the_gate
from attnserve_server.services.calls import Streams
from attnserve_server.services.outputs import Frame
from attnserve_server.services.regions import SharedMemoryService
from attnserve_server.services.runtime import Runtime, ticket_for
from attnserve_server.services.stream import StreamCall
from attnserve_server.services.tensors import TensorService
from attnserve_server.wire import answers, models

SERVICE = pb.DESCRIPTOR.services_by_name["AttentionService"].full_name

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


@dataclass(frozen=True, slots=True)
class _Planned:
    """A checked request, and the generation of the model store that it was checked against."""

    generation: int
    planned: tuple[validation.AttendPlan, Frame]


class AttentionService:
    """The methods of the service, over messages (`bytes` where tensors are looked at in place)."""

    def __init__(self, runtime: Runtime, streams: Streams, providers: tuple[str, ...]) -> None:
        self._runtime = runtime
        self._streams = streams
        self._providers = providers
        self._generation = 0
        self._plans: Layouts[_Planned] = Layouts()

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """What to add to a `grpc.Server`."""
        once, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        gated = grpc.stream_unary_rpc_method_handler
        gate = self._runtime.gate
        kept = TensorService(self._runtime)
        shared = SharedMemoryService(self._runtime.regions)
        metrics = self._runtime.metrics

        def plain(
            method: str,
            behaviour: Callable[[RequestT, grpc.ServicerContext], ResponseT],
            request: type[RequestT],
        ) -> "grpc.RpcMethodHandler[Any, Any]":
            def decoded(message: bytes, context: grpc.ServicerContext) -> ResponseT:
                return behaviour(request.FromString(message), context)  # type: ignore[attr-defined]

            return once(
                answering(metrics, method, decoded),
                response_serializer=lambda response: response.SerializeToString(),
            )

        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Attend": gated(answering_at_the_gate(metrics, gate, "Attend", self.attend)),
                "AttendStream": stream(self.attend_stream),
                "AttendTokens": gated(
                    answering_at_the_gate(metrics, gate, "AttendTokens", self.attend_tokens)
                ),
                "Decode": stream(self.decode),
                "PutTensor": grpc.stream_unary_rpc_method_handler(
                    answering(metrics, "PutTensor", kept.put),
                    response_serializer=lambda response: response.SerializeToString(),
                ),
                "RegisterSharedMemory": plain(
                    "RegisterSharedMemory", shared.register, pb.RegisterSharedMemoryRequest
                ),
                "UnregisterSharedMemory": plain(
                    "UnregisterSharedMemory", shared.unregister, pb.UnregisterSharedMemoryRequest
                ),
                "RenewTensor": plain("RenewTensor", kept.renew, pb.RenewTensorRequest),
                "DropTensor": plain("DropTensor", kept.drop, pb.DropTensorRequest),
                "ListModels": plain("ListModels", self.list_models, pb.ListModelsRequest),
                "GetModel": plain("GetModel", self.get_model, pb.GetModelRequest),
                "ServerInfo": plain("ServerInfo", self.server_info, pb.ServerInfoRequest),
            },
        )

    def attend(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """One attention computation."""
        arrived = time.perf_counter_ns()
        runtime = self._runtime
        (plan, frame), views = self._planned(request)
        ticket = ticket_for(context, plan.priority)
        with runtime.budget.lending(len(request) + plan.response_bytes):
            arrays = inputs.arrays(plan, views, runtime, ticket.caller)
            answer = outputs.begin(frame, runtime, ticket.caller)
            work = validation.complete(plan, arrays, answer.into)
            _, clock = runtime.attend(work, ticket, arrived)
            return answer.finish(clock.timings(time.perf_counter_ns()))

    def _planned(
        self, request: bytes
    ) -> tuple[tuple[validation.AttendPlan, Frame], dict[str, memoryview]]:
        """What a request asks for, and the elements of its tensors.

        Callers send the same request again and again with other elements: it is checked once.
        """
        runtime = self._runtime
        generation = runtime.store.generation
        if generation != self._generation:
            # Else what was remembered would keep unloaded models in memory.
            self._plans.forget()
            self._generation = generation
        found = self._plans.find(request)
        if found is not None and found[0].generation == generation:
            return found[0].planned, found[1]
        message, rooms = wire.locate(request, pb.AttendRequest, wire.REQUEST_TENSORS)
        sizes = {name: end - start for name, (start, end) in rooms.items()}
        plan = validation.plan(
            message,
            sizes,
            runtime.store,
            runtime.limits,
            chunks_allowed=False,
            kept=runtime.kept.get,
        )
        if plan.response_bytes > runtime.limits.max_message_bytes and plan.output_region is None:
            raise ExhaustedError(
                f"response size: its tensors take {plan.response_bytes} bytes; allowed in one "
                f"message: {runtime.limits.max_message_bytes}; use AttendStream"
            )
        planned = plan, outputs.frame(plan)
        self._plans.remember(request, rooms, _Planned(generation, planned))
        view = memoryview(request)
        return planned, {name: view[start:end] for name, (start, end) in rooms.items()}

    def attend_stream(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """Many attention computations on one stream."""
        call = StreamCall(self._runtime, context)
        with self._streams.having(call):
            yield from call.answers(requests)

    def attend_tokens(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Texts or token ids through a transformer."""
        arrived = time.perf_counter_ns()
        runtime = self._runtime
        message = pb.AttendTokensRequest.FromString(request)
        work = validation.tokens_work(message, runtime.store, runtime.limits)
        ticket = ticket_for(context, work.priority)
        results, clock = runtime.attend_tokens(work, ticket, arrived)
        timings = clock.timings(time.perf_counter_ns())
        return answers.tokens_response(work, results, timings).SerializeToString()

    def decode(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Attention over a KV cache in the server; not there yet."""
        error = UnimplementedError(
            "Decode: this server version keeps no KV sessions; call Attend with all keys and values"
        )
        self._runtime.metrics.requests.labels("Decode", error.code.name).inc()
        context.abort(error.code, str(error))
        yield b""  # never reached: it makes this the generator that grpc asks for

    def list_models(
        self, message: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        """Every model."""
        return pb.ListModelsResponse(models=map(models.model_message, self._runtime.store))

    def get_model(
        self, message: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        """One model."""
        if not message.name:
            raise InvalidRequestError.of("name", "nothing", "a name that ListModels gives")
        model = self._runtime.store.get(message.name, message.version)
        return pb.GetModelResponse(
            model=models.model_message(model), manifest_json=model.manifest.text
        )

    def server_info(
        self, message: pb.ServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.ServerInfoResponse:
        """What this server is."""
        return pb.ServerInfoResponse(
            name="attnserve",
            version=__version__,
            onnxruntime_version=onnxruntime.__version__,
            providers=self._providers,
            limits=models.limits_message(self._runtime.limits),
            state="draining" if self._runtime.scheduler.draining else "serving",
        )
