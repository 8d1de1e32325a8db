"""One inference of a token model by the Open Inference Protocol: decode, run, encode."""

from attnserve_dataplane import DataPlane, Request
from attnserve_proto import inference_wire
from attnserve_proto.inference import open_inference_pb2 as oip

from attnserve_server.models.store import ModelStore
from attnserve_server.oip import tensors, tokens
from attnserve_server.oip.tensors import Output
from attnserve_server.settings import Limits
from attnserve_server.tokens import run


class TokenInference:
    """Runs requests, whichever method they came by, and counts them by model."""

    def __init__(self, plane: DataPlane, store: ModelStore, limits: Limits) -> None:
        self._plane = plane
        self._store = store
        self._limits = limits

    def once(self, message: bytes, request: Request) -> bytes:
        """The answer to `ModelInfer`."""
        response, contents = self._answer(message, request)
        return inference_wire.join_serialised(response.SerializeToString(), contents)

    def streamed(self, message: bytes, request: Request) -> bytes:
        """The answer to one message of `ModelStreamInfer`; each request has one, its last."""
        response, contents = self._answer(message, request)
        response.parameters["triton_final_response"].bool_param = True
        return inference_wire.join_stream(response, contents)

    def _answer(
        self, serialised: bytes, request: Request
    ) -> tuple[oip.ModelInferResponse, list[memoryview]]:
        message, raw = inference_wire.split(serialised)
        model = self._store.get(message.model_name, message.model_version)
        name, version = model.manifest.name, model.manifest.version
        try:

            def shared(region: str, offset: int, byte_size: int) -> memoryview:
                return self._plane.region_view(region, offset, byte_size, request.peer).data

            asked = tensors.outputs(message, shared)
            asked = asked or [Output("last_hidden_state", None, None)]
            given = tensors.inputs(message, raw, shared)
            options = tokens.options(message)
            call = tokens.tokens_call(model, given, asked, options, self._limits)
            ran = run.attend(self._plane, request, call.work, options.timeout)
            arrays = tokens.padded(call, ran.outputs)
            limit = self._limits.max_message_bytes
            response, contents = tensors.answer(
                message, model, call.work.variant.name, asked, arrays, limit
            )
        except Exception:
            self._plane.count_failed_inference(name, version, request.arrived)
            raise
        self._plane.count_inference(
            name,
            version,
            call.work.count,
            ran.arrived,
            ran.validated,
            ran.started,
            ran.ended,
            ran.together,
            ran.leads,
        )
        return response, contents
