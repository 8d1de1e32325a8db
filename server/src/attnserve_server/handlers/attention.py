"""Methods of `attnserve.v1.AttentionService` that the control plane answers."""

from attnserve_dataplane import DataPlane, Request
from attnserve_proto import attention_pb2 as pb

from attnserve_server import __version__, messages
from attnserve_server.errors import InvalidRequestError
from attnserve_server.handlers.threads import Method
from attnserve_server.models.catalog import Catalog
from attnserve_server.models.providers import Providers
from attnserve_server.models.store import ModelStore
from attnserve_server.settings import Limits
from attnserve_server.tokens import run
from attnserve_server.tokens.answer import tokens_response
from attnserve_server.tokens.checks import tokens_work

SERVICE = pb.DESCRIPTOR.services_by_name["AttentionService"].full_name


class AttentionHandlers:
    """Those methods, over messages."""

    def __init__(
        self,
        plane: DataPlane,
        store: ModelStore,
        catalog: Catalog,
        limits: Limits,
        providers: Providers,
        onnxruntime_version: str,
    ) -> None:
        self._plane = plane
        self._store = store
        self._catalog = catalog
        self._limits = limits
        self._providers = providers
        self._onnxruntime_version = onnxruntime_version

    def methods(self) -> dict[str, Method]:
        """By path."""
        own = {
            "AttendTokens": self.attend_tokens,
            "ListModels": self.list_models,
            "GetModel": self.get_model,
            "ServerInfo": self.server_info,
        }
        return {f"/{SERVICE}/{name}": method for name, method in own.items()}

    def attend_tokens(self, message: bytes, request: Request) -> bytes:
        """Texts or token ids through a transformer."""
        asked = pb.AttendTokensRequest.FromString(message)
        work = tokens_work(asked, self._store, self._limits)
        return tokens_response(work, run.attend(self._plane, request, work)).SerializeToString()

    def list_models(self, message: bytes, request: Request) -> bytes:
        """Every model."""
        pb.ListModelsRequest.FromString(message)
        models = map(messages.model_message, self._store)
        return pb.ListModelsResponse(models=models).SerializeToString()

    def get_model(self, message: bytes, request: Request) -> bytes:
        """One model."""
        asked = pb.GetModelRequest.FromString(message)
        if not asked.name:
            raise InvalidRequestError.of("name", "nothing", "a name that ListModels gives")
        model = self._store.get(asked.name, asked.version)
        return pb.GetModelResponse(
            model=messages.model_message(model), manifest_json=model.manifest_json
        ).SerializeToString()

    def server_info(self, message: bytes, request: Request) -> bytes:
        """What this server is."""
        pb.ServerInfoRequest.FromString(message)
        return pb.ServerInfoResponse(
            name="attnserve",
            version=__version__,
            onnxruntime_version=self._onnxruntime_version,
            providers=self._providers.names,
            limits=messages.limits_message(self._limits),
            state="draining" if self._plane.draining else "serving",
            unavailable=map(messages.unavailable_message, self._catalog.unavailable()),
        ).SerializeToString()
