"""The asyncio client: `AttentionClient` awaited, but for its streams and shared memory."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import grpc
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from attnserve_client import _attend, _channel, _errors, _messages, _retries, _tensors
from attnserve_client._assembly import Assembler
from attnserve_client._attend import AttendCall
from attnserve_client._messages import Tokens
from attnserve_client._results import AttendResult, Model, ServerInfo, StoredTensor, TokensResult


class AsyncAttentionClient:
    """Calls an attnserve server from asyncio; many calls may be under way at once.

    Args:
        target: `host:port`, or any target that grpc understands.
        credentials: for TLS; None is a plaintext channel.
        stream_threshold_bytes: requests whose tensors, both ways, exceed this go over
            AttendStream in chunks.

    Calls are repeated, and the environment's proxy is used, as by `AttentionClient`.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        stream_threshold_bytes: int = _channel.STREAM_THRESHOLD_BYTES,
    ) -> None:
        options = _channel.options(target)
        self._channel = (
            grpc.aio.secure_channel(target, credentials, options=options)
            if credentials
            else grpc.aio.insecure_channel(target, options=options)
        )
        self._threshold = stream_threshold_bytes
        self._retries = _retries.AsyncRetries()
        self._stub: pb_grpc.AttentionServiceAsyncStub = pb_grpc.AttentionServiceStub(self._channel)
        self._attend = self._channel.unary_unary(_channel.method_path("Attend"), None, None)
        self._attend_stream = self._channel.stream_stream(
            _channel.method_path("AttendStream"), None, None
        )
        self._put_tensor = self._channel.stream_unary(_channel.method_path("PutTensor"), None, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._retries.close()
        await self._channel.close(None)

    async def attend(
        self,
        query: Any = None,
        key: Any = None,
        value: Any = None,
        *,
        model: str,
        version: str | int = "",
        variant: str = "",
        hidden_states: Any = None,
        context: Any = None,
        key_lengths: Any = None,
        bias: Any = None,
        scale: float | None = None,
        softcap: float | None = None,
        return_output: bool = True,
        return_weights: bool = False,
        return_entropy: bool = False,
        top_k: int = 0,
        return_mass_per_key: bool = False,
        mass_by_distance: int = 0,
        priority: int = 0,
        timeout: float | None = 60.0,
    ) -> AttendResult:
        """Compute attention; arguments, result and errors as those of `AttentionClient.attend`."""
        call = _attend.attend_call(
            {
                "query": query,
                "key": key,
                "value": value,
                "hidden_states": hidden_states,
                "context": context,
                "key_lengths": key_lengths,
                "bias": bias,
            },
            model=model,
            version=str(version),
            variant=variant,
            scale=scale,
            softcap=softcap,
            no_output=not return_output,
            return_weights=return_weights,
            return_entropy=return_entropy,
            top_k=top_k,
            return_mass_per_key=return_mass_per_key,
            mass_by_distance=mass_by_distance,
            priority=priority,
        )
        plan = call.plan
        if plan.request_bytes + plan.response_bytes > self._threshold:
            return await self._attend_streamed(call, timeout)
        answer = await self._retries.call(
            "Attend", lambda left: self._attend(call.to_bytes(), timeout=left), timeout
        )
        result, _ = plan.answers.read(answer)
        return result

    async def _attend_streamed(self, call: AttendCall, timeout: float | None) -> AttendResult:
        async def send(left: float | None) -> AttendResult:
            assembler = Assembler()
            assembler.expect(1, call.plan.answers)
            finished = None
            stream = self._attend_stream(None, timeout=left)
            async with _sending(stream, call.to_stream(1, None)):
                async for message in stream:
                    done = assembler.add(message)
                    if done is not None:
                        finished = done[1]
                        if isinstance(finished, _errors.AttnserveError):
                            stream.cancel()  # what is left of the request need not be sent
                            break
            return _errors.result_of(finished, "AttendStream")

        return await self._retries.call("AttendStream", send, timeout)

    async def put_tensor(
        self, array: Any, *, lease: float | None = None, timeout: float | None = 60.0
    ) -> StoredTensor:
        """Keep a tensor in the server; as `AttentionClient.put_tensor`."""
        elements = _tensors.as_array(array, "array")

        async def send(left: float | None) -> bytes:
            messages = _messages.put_messages(elements, lease, _channel.CHUNK_BYTES)
            put = self._put_tensor(None, timeout=left)
            async with _sending(put, messages):
                answer: bytes = await put
            return answer

        answer = await self._retries.call("PutTensor", send, timeout)
        stored = pb.StoredTensor.FromString(answer)
        return _messages.stored_from(stored, elements.shape, elements.dtype)

    async def renew_tensor(
        self, tensor: StoredTensor, *, lease: float | None = None, timeout: float | None = 10.0
    ) -> StoredTensor:
        """Start a stored tensor's lease anew; as `AttentionClient.renew_tensor`."""
        request = pb.RenewTensorRequest(handle=tensor.handle, lease=round((lease or 0) * 1e6))
        answer = await self._retries.call(
            "RenewTensor", lambda left: self._stub.RenewTensor(request, timeout=left), timeout
        )
        return _messages.stored_from(answer, tensor.shape, tensor.dtype)

    async def drop_tensor(self, tensor: StoredTensor, *, timeout: float | None = 10.0) -> None:
        """Give a stored tensor up; as `AttentionClient.drop_tensor`."""
        await self._retries.call(
            "DropTensor",
            lambda left: self._stub.DropTensor(
                pb.DropTensorRequest(handle=tensor.handle), timeout=left
            ),
            timeout,
        )

    async def attend_tokens(
        self,
        inputs: Tokens,
        *,
        model: str,
        version: str | int = "",
        variant: str = "",
        targets: Tokens | None = None,
        attention: str = "",
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        return_hidden: bool = True,
        return_pooled: bool = False,
        return_weights: bool | None = None,
        return_entropy: bool = False,
        return_effective_context: bool = False,
        mass_by_distance: int = 0,
        mass_on_first: int = 0,
        truncate: bool = False,
        timeout: float | None = 60.0,
    ) -> TokensResult:
        """Run texts or ids through a transformer; as `AttentionClient.attend_tokens`."""
        request = _messages.tokens_request(
            inputs,
            model=model,
            version=str(version),
            variant=variant,
            targets=targets,
            attention=attention,
            layers=layers,
            heads=heads,
            return_hidden=return_hidden,
            return_pooled=return_pooled,
            return_weights=return_weights,
            return_entropy=return_entropy,
            return_effective_context=return_effective_context,
            mass_by_distance=mass_by_distance,
            mass_on_first=mass_on_first,
            truncate=truncate,
        )
        return _messages.tokens_result(
            await self._retries.call(
                "AttendTokens", lambda left: self._stub.AttendTokens(request, timeout=left), timeout
            )
        )

    async def list_models(self, *, timeout: float | None = 10.0) -> list[Model]:
        """All models and versions, by name and version."""
        answer = await self._retries.call(
            "ListModels",
            lambda left: self._stub.ListModels(pb.ListModelsRequest(), timeout=left),
            timeout,
        )
        return [_messages.model_from(model) for model in answer.models]

    async def get_model(
        self, name: str, version: str | int = "", *, timeout: float | None = 10.0
    ) -> Model:
        """One model, its manifest included.

        Raises:
            NotFoundError: no such model or version.
        """
        request = pb.GetModelRequest(name=name, version=str(version))
        answer = await self._retries.call(
            "GetModel", lambda left: self._stub.GetModel(request, timeout=left), timeout
        )
        return _messages.model_from(answer.model, answer.manifest_json)

    async def server_info(self, *, timeout: float | None = 10.0) -> ServerInfo:
        """What the server is, what it runs on and what it accepts."""
        answer = await self._retries.call(
            "ServerInfo",
            lambda left: self._stub.ServerInfo(pb.ServerInfoRequest(), timeout=left),
            timeout,
        )
        return _messages.server_info_from(answer)


@asynccontextmanager
async def _sending(call: Any, messages: Iterable[bytes]) -> AsyncIterator[None]:
    """Send a call's messages while its answer is awaited within."""
    task = asyncio.create_task(_send(call, messages))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _send(call: Any, messages: Iterable[bytes]) -> None:
    # Not by grpc.aio's own `write`, nor by an iterator given to it: to those, a server that ends
    # the call before it has read everything is "INTERNAL: Internal error from Core", and what the
    # server said, its status and when to come back, is lost. Whoever awaits the answer hears it.
    try:
        await call.wait_for_connection()
        for message in messages:
            await call._cython_call.send_serialized_message(message)
        await call.done_writing()
    except (grpc.RpcError, cygrpc.InternalError):
        pass
    except Exception:  # of the messages: no answer will come
        call.cancel()
        raise
