"""Methods of `inference.GRPCInferenceService` that the control plane answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from attnserve_dataplane import DataPlane, Request, RequestError
from attnserve_proto.inference import open_inference_pb2 as oip
from google.protobuf.message import Message

from attnserve_server import __version__
from attnserve_server.errors import Code, InvalidRequestError
from attnserve_server.handlers.threads import Method
from attnserve_server.models.catalog import READY, Catalog
from attnserve_server.models.store import ModelStore
from attnserve_server.oip import models as encode
from attnserve_server.oip.infer import TokenInference
from attnserve_server.settings import Limits, Settings

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
    "trace",
)

RequestT = TypeVar("RequestT", bound=Message)


class InferenceHandlers:
    """Those methods, over messages.

    Args:
        plane: the data plane.
        store: what is loaded.
        catalog: the repository.
        limits: what is accepted.
        concurrency: computations at once.
        traces: how they are set, by Triton's names.
    """

    def __init__(
        self,
        plane: DataPlane,
        store: ModelStore,
        catalog: Catalog,
        limits: Limits,
        concurrency: int,
        traces: Mapping[str, Sequence[str]],
    ) -> None:
        self._plane = plane
        self._store = store
        self._catalog = catalog
        self._limits = limits
        self._concurrency = concurrency
        self._traces = traces
        self._tokens = TokenInference(plane, store, limits)

    def methods(self) -> dict[str, Method]:
        """By path."""
        own = {
            "ModelInfer": self._tokens.once,
            "ModelStreamInfer": self._tokens.streamed,
            "ServerLive": _decoded(self.server_live, oip.ServerLiveRequest),
            "ServerReady": _decoded(self.server_ready, oip.ServerReadyRequest),
            "ModelReady": _decoded(self.model_ready, oip.ModelReadyRequest),
            "ServerMetadata": _decoded(self.server_metadata, oip.ServerMetadataRequest),
            "ModelMetadata": _decoded(self.model_metadata, oip.ModelMetadataRequest),
            "ModelConfig": _decoded(self.model_config, oip.ModelConfigRequest),
            "ModelStatistics": _decoded(self.model_statistics, oip.ModelStatisticsRequest),
            "RepositoryIndex": _decoded(self.repository_index, oip.RepositoryIndexRequest),
            "RepositoryModelLoad": _decoded(self.repository_load, oip.RepositoryModelLoadRequest),
            "RepositoryModelUnload": _decoded(
                self.repository_unload, oip.RepositoryModelUnloadRequest
            ),
            "SystemSharedMemoryStatus": _decoded(
                self.shared_memory_status, oip.SystemSharedMemoryStatusRequest
            ),
            "SystemSharedMemoryRegister": _decoded(
                self.shared_memory_register, oip.SystemSharedMemoryRegisterRequest
            ),
            "SystemSharedMemoryUnregister": _decoded(
                self.shared_memory_unregister, oip.SystemSharedMemoryUnregisterRequest
            ),
            "TraceSetting": _decoded(self.trace_setting, oip.TraceSettingRequest),
        }
        return {f"/{SERVICE}/{name}": method for name, method in own.items()}

    def server_live(
        self, message: oip.ServerLiveRequest, request: Request
    ) -> oip.ServerLiveResponse:
        """Whether the process answers."""
        return oip.ServerLiveResponse(live=True)

    def server_ready(
        self, message: oip.ServerReadyRequest, request: Request
    ) -> oip.ServerReadyResponse:
        """Whether requests are taken."""
        return oip.ServerReadyResponse(ready=self._ready())

    def model_ready(
        self, message: oip.ModelReadyRequest, request: Request
    ) -> oip.ModelReadyResponse:
        """Whether a version can be called; without one, whether the highest there is can."""
        try:
            self._store.get(message.name, message.version)
        except RequestError:
            return oip.ModelReadyResponse(ready=False)
        ready = bool(message.version) or self._catalog.ready(message.name)
        return oip.ModelReadyResponse(ready=ready and self._ready())

    def _ready(self) -> bool:
        return not self._plane.draining and self._plane.wedged_runs == 0

    def server_metadata(
        self, message: oip.ServerMetadataRequest, request: Request
    ) -> oip.ServerMetadataResponse:
        """What this server is."""
        return oip.ServerMetadataResponse(
            name="attnserve", version=__version__, extensions=EXTENSIONS
        )

    def model_metadata(
        self, message: oip.ModelMetadataRequest, request: Request
    ) -> oip.ModelMetadataResponse:
        """What a model takes and gives."""
        store = self._store
        model = store.get(message.name, message.version)
        return encode.metadata(model, store.versions(message.name))

    def model_config(
        self, message: oip.ModelConfigRequest, request: Request
    ) -> oip.ModelConfigResponse:
        """A model as Triton's configuration would describe it."""
        model = self._store.get(message.name, message.version)
        max_batch = self._limits.max_batch
        return oip.ModelConfigResponse(config=encode.config(model, max_batch, self._concurrency))

    def model_statistics(
        self, message: oip.ModelStatisticsRequest, request: Request
    ) -> oip.ModelStatisticsResponse:
        """What was counted of one model, or of all."""
        store = self._store
        models = list(store)
        if message.name:
            one = store.get(message.name, message.version)
            models = [m for m in models if m.manifest.name == message.name]
            if message.version:
                models = [one]
        return oip.ModelStatisticsResponse(
            model_stats=[
                encode.statistics(
                    model, self._plane.infer_counts(model.manifest.name, model.manifest.version)
                )
                for model in models
            ]
        )

    def repository_index(
        self, message: oip.RepositoryIndexRequest, request: Request
    ) -> oip.RepositoryIndexResponse:
        """What the repository holds."""
        _check_repository(message.repository_name)
        entries = self._catalog.entries()
        return encode.index([e for e in entries if e.state == READY or not message.ready])

    def repository_load(
        self, message: oip.RepositoryModelLoadRequest, request: Request
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
        self, message: oip.RepositoryModelUnloadRequest, request: Request
    ) -> oip.RepositoryModelUnloadResponse:
        """Unload a model."""
        _check_repository(message.repository_name)
        for name in message.parameters:
            if name != "unload_dependents":
                raise InvalidRequestError.of("parameters", repr(name[:80]), "unload_dependents")
        self._catalog.unload(message.model_name)
        return oip.RepositoryModelUnloadResponse()

    def shared_memory_status(
        self, message: oip.SystemSharedMemoryStatusRequest, request: Request
    ) -> oip.SystemSharedMemoryStatusResponse:
        """The caller's regions."""
        return encode.regions(self._plane.regions(message.name, request.peer))

    def shared_memory_register(
        self, message: oip.SystemSharedMemoryRegisterRequest, request: Request
    ) -> oip.SystemSharedMemoryRegisterResponse:
        """Map a region of the caller."""
        self._plane.add_region(
            message.name, message.key, message.offset, message.byte_size, request.peer
        )
        return oip.SystemSharedMemoryRegisterResponse()

    def shared_memory_unregister(
        self, message: oip.SystemSharedMemoryUnregisterRequest, request: Request
    ) -> oip.SystemSharedMemoryUnregisterResponse:
        """Forget a region of the caller, or all. As with Triton, one that is not there is fine."""
        if not message.name:
            self._plane.remove_regions(request.peer)
            return oip.SystemSharedMemoryUnregisterResponse()
        try:
            self._plane.remove_region(message.name, request.peer)
        except RequestError as error:
            if error.args[0] != Code.NOT_FOUND:
                raise
        return oip.SystemSharedMemoryUnregisterResponse()

    def trace_setting(
        self, message: oip.TraceSettingRequest, request: Request
    ) -> oip.TraceSettingResponse:
        """How traces are set."""
        if message.model_name:
            self._store.get(message.model_name, "")
        for name in message.settings:
            raise InvalidRequestError.of(
                "settings",
                repr(name[:80]),
                "none: traces are set when the server starts, by --trace-endpoint, --trace-sample "
                "and --max-traces-per-second",
            )
        return oip.TraceSettingResponse(
            settings={
                name: oip.TraceSettingResponse.SettingValue(value=values)
                for name, values in self._traces.items()
            }
        )


def trace_settings(settings: Settings) -> dict[str, list[str]]:
    """How traces are set, under Triton's names.

    https://github.com/triton-inference-server/server/blob/main/docs/user_guide/trace.md
    """
    if settings.trace_endpoint is None:
        return {"trace_level": ["OFF"]}
    sample = settings.trace_sample
    return {
        "trace_level": ["TIMESTAMPS"],
        # One of so many calls that belong to no trace; 0: none.
        "trace_rate": [str(round(1 / sample)) if sample else "0"],
        "trace_count": ["-1"],
        "trace_mode": ["opentelemetry"],
        "opentelemetry,url": [settings.trace_endpoint],
        "max_traces_per_second": [str(settings.max_traces_per_second)],
    }


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequestError.of(
            "repository_name", repr(name[:80]), "nothing: there is one repository"
        )


def _decoded(
    behaviour: Callable[[RequestT, Request], Message], message_type: type[RequestT]
) -> Method:
    def method(message: bytes, request: Request) -> bytes:
        asked = message_type.FromString(message)
        return behaviour(asked, request).SerializeToString()

    return method
