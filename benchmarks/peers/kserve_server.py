"""KServe's Python server over an ONNX file."""

import logging
import sys
from typing import Any

from onnx_file import OnnxFile, announce, arguments, free_port

OPTIONS = arguments()
# KServe reads the command line itself, when imported, and refuses nothing that it does not know.
sys.argv = sys.argv[:1]

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer  # noqa: E402


class Causal(Model):  # type: ignore[misc]
    """A model whose requests run one by one, as KServe's own runtimes run theirs."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._graph = OnnxFile(str(OPTIONS.model), OPTIONS.threads)
        self.ready = True

    async def predict(self, payload: InferRequest, *_: Any, **__: Any) -> InferResponse:
        """Answer one request."""
        arrays = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
        output = self._graph.run(arrays["query"], arrays["key"], arrays["value"])
        answer = InferOutput(name="output", shape=list(output.shape), datatype="FP32")
        answer.set_data_from_numpy(output)
        return InferResponse(payload.id, self.name, [answer])


def main() -> None:
    """Serve until terminated."""
    logging.disable(logging.WARNING)
    port = free_port()
    server = ModelServer(http_port=free_port(), grpc_port=port, enable_latency_logging=False)
    announce(port, "kserve")
    server.start([Causal("causal")])


if __name__ == "__main__":
    main()
