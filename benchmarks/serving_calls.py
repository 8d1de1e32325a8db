"""How the load generator's callers call: one request, prepared once, sent again and again."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import numpy as np
from attnserve_client import AsyncAttentionClient, ResourceExhaustedError
from attnserve_client import _channel as channel
from attnserve_loadtest.load.plan import Caller, Heard
from attnserve_loadtest.load.requests import Request
from attnserve_proto import attention_pb2 as pb
from numpy.typing import NDArray

NUM_HEADS, HEAD_DIM = 8, 64
TIMEOUT = 15.0

Array = NDArray[np.float32]
Call = Callable[[], Awaitable[object]]
Close = Callable[[], Awaitable[None]]


Protocol = Literal["sdk", "message", "triton"]


@dataclass(frozen=True)
class Target:
    """A server and the request that callers send it.

    Attributes:
        protocol: "sdk", the typed API through the SDK; "message", the typed API by a message that
            was built beforehand, with answers left unread: the least that a client can cost;
            "triton", the Open Inference Protocol through tritonclient.
        address: host:port.
        seq_len: of query, key and value, [1, 8, seq_len, 64] FP32.
        model: its name.
    """

    protocol: Protocol
    address: str
    seq_len: int
    model: str = "causal"

    def connect(self) -> Caller:
        """Calls it over one connection. Needs a running event loop."""
        ways = {"sdk": _sdk, "message": _message, "triton": _triton}
        return _Caller(*ways[self.protocol](self))


@dataclass(frozen=True)
class _Caller:
    """Sends the one request, whatever is asked for."""

    send: Call
    shut: Close

    async def call(self, request: Request, heard: Heard) -> object:
        """Send it."""
        return await self.send()

    def is_refusal(self, error: BaseException) -> bool:
        """As the function of that name."""
        return is_refusal(error)

    async def close(self) -> None:
        """Close the connection."""
        await self.shut()


def is_refusal(error: BaseException) -> bool:
    """Whether the server refused the request because it has too much to do."""
    if isinstance(error, ResourceExhaustedError):
        return True
    code = getattr(error, "code", None)
    if isinstance(error, grpc.RpcError) and callable(code):
        return bool(code() == grpc.StatusCode.RESOURCE_EXHAUSTED)
    status = getattr(error, "status", None)  # tritonclient's
    return callable(status) and "RESOURCE_EXHAUSTED" in str(status())


def tensors(seq_len: int, query_len: int | None = None) -> tuple[Array, Array, Array]:
    """Random query, key and value."""
    generator = np.random.default_rng(seq_len)
    lengths = (query_len or seq_len, seq_len, seq_len)
    q, k, v = (
        generator.standard_normal((1, NUM_HEADS, length, HEAD_DIM), np.float32)
        for length in lengths
    )
    return q, k, v


def triton_request(arrays: Mapping[str, Array]) -> tuple[list[Any], list[Any]]:
    """tritonclient's inputs, and the output that is asked for."""
    from tritonclient.grpc import InferInput, InferRequestedOutput

    inputs = []
    for name, array in arrays.items():
        inputs.append(InferInput(name, array.shape, "FP32"))
        inputs[-1].set_data_from_numpy(array)
    return inputs, [InferRequestedOutput("output")]


def _sdk(target: Target) -> tuple[Call, Close]:
    client = AsyncAttentionClient(target.address)
    q, k, v = tensors(target.seq_len)
    return lambda: client.attend(q, k, v, model=target.model, timeout=TIMEOUT), client.close


def _message(target: Target) -> tuple[Call, Close]:
    q, k, v = (
        pb.Tensor(dtype=pb.FP32, shape=array.shape, data=array.tobytes())
        for array in tensors(target.seq_len)
    )
    request = pb.AttendRequest(model=target.model, query=q, key=k, value=v).SerializeToString()
    connection = grpc.aio.insecure_channel(target.address, options=channel.options(target.address))
    attend = connection.unary_unary(channel.method_path("Attend"), None, None)
    return lambda: attend(request, timeout=TIMEOUT), lambda: connection.close(None)


def _triton(target: Target) -> tuple[Call, Close]:
    # Here, since it is needed by nobody else and may not be installed.
    from tritonclient.grpc.aio import InferenceServerClient

    client = InferenceServerClient(target.address)
    names = ("query", "key", "value")
    inputs, outputs = triton_request(dict(zip(names, tensors(target.seq_len), strict=True)))

    async def call() -> object:
        answer = await client.infer(target.model, inputs, outputs=outputs, client_timeout=TIMEOUT)
        return answer.as_numpy("output")

    return call, client.close
