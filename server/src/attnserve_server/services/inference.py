"""`inference.GRPCInferenceService`, the Open Inference Protocol: decode, call, encode."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from attnserve_proto.inference import open_inference_pb2 as oip
from google.protobuf.message import Message

from attnserve_server import __version__
from attnserve_server.engine.catalog import READY, Catalog
from attnserve_server.errors import (
    InvalidRequestError,
    NotFoundError,
    RequestError,
    UnimplementedError,
)
from attnserve_server.services.answering import answering, answering_at_the_gate
from attnserve_server.services.calls import Streams
from attnserve_server.services.infer import Inference
from attnserve_server.services.inference_stream import InferStreamCall
from attnserve_server.services.runtime import Runtime, ticket_for
from attnserve_server.shared_memory import owner_of
from attnserve_server.statistics import Statistics
from attnserve_server.wire import inference_models as encode

SERVICE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

# As Triton names what goes beyond the protocol.
EXTENSIONS = (
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "parameters",
    "statistics",
)

# Triton's methods that this server does not have, and why.
_MISSING = {
    "CudaSharedMemoryStatus": "this server takes no CUDA shared memory; use system shared memory",
    "CudaSharedMemoryRegister": "this server takes no CUDA shared memory; use system shared memory",
    "CudaSharedMemoryUnregister": "this server takes no CUDA shared memory",
    "TraceSetting": "this server has no traces; its metrics and ModelStatistics have durations",
    "LogSettings": "the log is set when the server starts, by --log-level and --log-format",
}

RequestT = TypeVar("RequestT", bound=Message)


class InferenceService:
    """The methods of the service, over messages (`bytes` where tensors are looked at in place).

    Args:
        runtime: what requests need.
        streams: where open streams are kept.
        catalog: the repository.
        concurrency: computations at once.
    """

    def __init__(
        self,
        runtime: Runtime,
        streams: Streams,
        catalog: Catalog,
        concurrency: int,
    ) -> None:
        self._runtime = runtime
        self._streams = streams
        self._regions = runtime.regions
        self._catalog = catalog
        self._concurrency = concurrency
        self._statistics = Statistics()
        self._inference = Inference(runtime, self._statistics)

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """What to add to a `grpc.Server`."""
        unary = grpc.unary_unary_rpc_method_handler
        metrics = self._runtime.metrics

        def plain(
            behaviour: Callable[[RequestT, grpc.ServicerContext], Message], request: type[RequestT]
        ) -> "grpc.RpcMethodHandler[Any, Any]":
            method = request.DESCRIPTOR.name.removesuffix("Request")

            def decoded(message: bytes, context: grpc.ServicerContext) -> bytes:
                return behaviour(request.FromString(message), context).SerializeToString()

            return unary(answering(metrics, method, decoded))

        handlers = {
            "ServerLive": plain(self.server_live, oip.ServerLiveRequest),
            "ServerReady": plain(self.server_ready, oip.ServerReadyRequest),
            "ModelReady": plain(self.model_ready, oip.ModelReadyRequest),
            "ServerMetadata": plain(self.server_metadata, oip.ServerMetadataRequest),
            "ModelMetadata": plain(self.model_metadata, oip.ModelMetadataRequest),
            "ModelInfer": grpc.stream_unary_rpc_method_handler(
                answering_at_the_gate(metrics, self._runtime.gate, "ModelInfer", self.model_infer)
            ),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.model_stream_infer),
            "ModelConfig": plain(self.model_config, oip.ModelConfigRequest),
            "ModelStatistics": plain(self.model_statistics, oip.ModelStatisticsRequest),
            "RepositoryIndex": plain(self.repository_index, oip.RepositoryIndexRequest),
            "RepositoryModelLoad": plain(self.repository_load, oip.RepositoryModelLoadRequest),
            "RepositoryModelUnload": plain(
                self.repository_unload, oip.RepositoryModelUnloadRequest
            ),
            "SystemSharedMemoryStatus": plain(
                self.shared_memory_status, oip.SystemSharedMemoryStatusRequest
            ),
            "SystemSharedMemoryRegister": plain(
                self.shared_memory_register, oip.SystemSharedMemoryRegisterRequest
            ),
            "SystemSharedMemoryUnregister": plain(
                self.shared_memory_unregister, oip.SystemSharedMemoryUnregisterRequest
            ),
        }
        for method, reason in _MISSING.items():
            handlers[method] = unary(answering(metrics, method, _refusing(method, reason)))
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def server_live(
        self, message: oip.ServerLiveRequest, context: grpc.ServicerContext
    ) -> oip.ServerLiveResponse:
        """Whether the process answers."""
        return oip.ServerLiveResponse(live=True)

    def server_ready(
        self, message: oip.ServerReadyRequest, context: grpc.ServicerContext
    ) -> oip.ServerReadyResponse:
        """Whether requests are taken."""
        return oip.ServerReadyResponse(ready=not self._runtime.scheduler.draining)

    def model_ready(
        self, message: oip.ModelReadyRequest, context: grpc.ServicerContext
    ) -> oip.ModelReadyResponse:
        """Whether a model can be called."""
        try:
            self._runtime.store.get(message.name, message.version)
        except RequestError:
            return oip.ModelReadyResponse(ready=False)
        return oip.ModelReadyResponse(ready=not self._runtime.scheduler.draining)

    def server_metadata(
        self, message: oip.ServerMetadataRequest, context: grpc.ServicerContext
    ) -> oip.ServerMetadataResponse:
        """What this server is."""
        return oip.ServerMetadataResponse(
            name="attnserve", version=__version__, extensions=EXTENSIONS
        )

    def model_metadata(
        self, message: oip.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> oip.ModelMetadataResponse:
        """What a model takes and gives."""
        store = self._runtime.store
        model = store.get(message.name, message.version)
        return encode.metadata(model, store.versions(message.name))

    def model_infer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """One inference."""
        arrived = time.perf_counter_ns()
        ticket = ticket_for(context)
        with self._runtime.budget.lending(len(request)):
            return self._inference.answer_once(request, ticket.caller, ticket, arrived)

    def model_stream_infer(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """Many inferences on one stream."""
        call = InferStreamCall(self._runtime, self._inference, context)
        with self._streams.having(call):
            yield from call.answers(requests)

    def model_config(
        self, message: oip.ModelConfigRequest, context: grpc.ServicerContext
    ) -> oip.ModelConfigResponse:
        """A model as Triton's configuration would describe it."""
        model = self._runtime.store.get(message.name, message.version)
        max_batch = self._runtime.limits.max_batch
        return oip.ModelConfigResponse(config=encode.config(model, max_batch, self._concurrency))

    def model_statistics(
        self, message: oip.ModelStatisticsRequest, context: grpc.ServicerContext
    ) -> oip.ModelStatisticsResponse:
        """What was counted of one model, or of all."""
        store, counts = self._runtime.store, self._statistics
        models = list(store)
        if message.name:
            one = store.get(message.name, message.version)
            models = [m for m in models if m.manifest.name == message.name]
            if message.version:
                models = [one]
        return oip.ModelStatisticsResponse(
            model_stats=[
                encode.statistics(model, counts.of(model.manifest.name, model.manifest.version))
                for model in models
            ]
        )

    def repository_index(
        self, message: oip.RepositoryIndexRequest, context: grpc.ServicerContext
    ) -> oip.RepositoryIndexResponse:
        """What the repository holds."""
        _check_repository(message.repository_name)
        entries = self._catalog.entries()
        return encode.index([e for e in entries if e.state == READY or not message.ready])

    def repository_load(
        self, message: oip.RepositoryModelLoadRequest, context: grpc.ServicerContext
    ) -> oip.RepositoryModelLoadResponse:
        """Load a model from the repository."""
        _check_repository(message.repository_name)
        for name in message.parameters:
            raise InvalidRequestError.of(
                "parameters", repr(name[:80]), "none: a model is loaded as the repository has it"
            )
        self._catalog.load(message.model_name)
        return oip.RepositoryModelLoadResponse()

    def repository_unload(
        self, message: oip.RepositoryModelUnloadRequest, context: grpc.ServicerContext
    ) -> oip.RepositoryModelUnloadResponse:
        """Unload a model."""
        _check_repository(message.repository_name)
        for name in message.parameters:
            if name != "unload_dependents":
                raise InvalidRequestError.of("parameters", repr(name[:80]), "unload_dependents")
        self._catalog.unload(message.model_name)
        return oip.RepositoryModelUnloadResponse()

    def shared_memory_status(
        self, message: oip.SystemSharedMemoryStatusRequest, context: grpc.ServicerContext
    ) -> oip.SystemSharedMemoryStatusResponse:
        """The caller's regions."""
        return encode.regions(self._regions.status(message.name, owner_of(context.peer())))

    def shared_memory_register(
        self, message: oip.SystemSharedMemoryRegisterRequest, context: grpc.ServicerContext
    ) -> oip.SystemSharedMemoryRegisterResponse:
        """Map a region of the caller."""
        self._regions.register(
            message.name, message.key, message.offset, message.byte_size, owner_of(context.peer())
        )
        return oip.SystemSharedMemoryRegisterResponse()

    def shared_memory_unregister(
        self, message: oip.SystemSharedMemoryUnregisterRequest, context: grpc.ServicerContext
    ) -> oip.SystemSharedMemoryUnregisterResponse:
        """Forget a region of the caller, or all. As with Triton, one that is not there is fine."""
        owner = owner_of(context.peer())
        if message.name:
            with contextlib.suppress(NotFoundError):
                self._regions.unregister(message.name, owner)
        else:
            self._regions.unregister_all(owner)
        return oip.SystemSharedMemoryUnregisterResponse()


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequestError.of(
            "repository_name", repr(name[:80]), "nothing: there is one repository"
        )


def _refusing(method: str, reason: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
        raise UnimplementedError(f"{method}: {reason}")

    return refuse
