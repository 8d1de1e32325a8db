"""MLServer over an ONNX file, by a runtime of its own kind (`MLModel`)."""

import argparse
import asyncio

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse
from onnx_file import OnnxFile, announce, arguments, free_port


class Causal(MLModel):  # type: ignore[misc]
    """Runs the file that `parameters.uri` names."""

    async def load(self) -> bool:
        """Load it."""
        parameters = self.settings.parameters
        self._graph = OnnxFile(parameters.uri, parameters.extra["threads"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer one request, or a batch that MLServer put together."""
        arrays = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        output = self._graph.run(arrays["query"], arrays["key"], arrays["value"])
        return InferenceResponse(
            id=payload.id,
            model_name=self.name,
            outputs=[NumpyCodec.encode_output("output", output)],
        )


async def serve(options: argparse.Namespace) -> None:
    """Serve until terminated."""
    port = free_port()
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=free_port(),
        grpc_port=port,
        metrics_endpoint=None,
        parallel_workers=0,
        grpc_max_message_length=-1,
    )
    parameters = ModelParameters(uri=str(options.model), extra={"threads": options.threads})
    model = ModelSettings(name="causal", implementation=Causal, parameters=parameters)
    server = MLServer(settings)
    announce(port, "mlserver")
    await server.start([model])


if __name__ == "__main__":
    asyncio.run(serve(arguments()))
