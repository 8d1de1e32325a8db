"""PyTriton: Triton's own front end, with ONNX Runtime behind it in Python."""

from typing import Any

import numpy as np
from onnx_file import OnnxFile, announce, arguments, free_port
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

MAX_BATCH = 64


def main() -> None:
    """Serve until terminated."""
    options = arguments()
    graph = OnnxFile(str(options.model), options.threads)

    @batch  # type: ignore[untyped-decorator]
    def infer(query: Any, key: Any, value: Any) -> list[Any]:
        return [graph.run(query, key, value)]

    port = free_port()
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=free_port(),
        grpc_address="127.0.0.1",
        grpc_port=port,
        allow_metrics=False,
    )
    # [H, S, D]: Triton adds the batch itself.
    shape = (8, -1, 64)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="causal",
            infer_func=infer,
            inputs=[
                Tensor(name=n, dtype=np.float32, shape=shape) for n in ("query", "key", "value")
            ],
            outputs=[Tensor(name="output", dtype=np.float32, shape=shape)],
            config=ModelConfig(max_batch_size=MAX_BATCH, batching=True, batcher=DynamicBatcher()),
        )
        triton.run()
        announce(port, "nvidia-pytriton")
        triton.serve()


if __name__ == "__main__":
    main()
