"""The SDK against a real grpc server that misbehaves on purpose."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    AttnserveError,
    ClientOptions,
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
    UnavailableError,
    _errors,
)
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc

Q = np.ones((1, 2, 3, 4), np.float32)


@contextmanager
def served(
    attend: Callable[[pb.AttendRequest, grpc.ServicerContext], pb.AttendResponse],
) -> Iterator[str]:
    class Service(pb_grpc.AttentionServiceServicer):
        def Attend(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
            return attend(request, context)

    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_AttentionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def test_unavailable_is_tried_again() -> None:
    calls = []

    def attend(request: pb.AttendRequest, context: grpc.ServicerContext) -> pb.AttendResponse:
        calls.append(request)
        if len(calls) < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        return pb.AttendResponse(model=request.model, output=request.query)

    with served(attend) as address, AttentionClient(address) as client:
        result = client.attend(Q, Q, Q, model="m")
    assert len(calls) == 3
    np.testing.assert_array_equal(result.output, Q)
    assert result.output.flags.writeable


def test_other_statuses_are_not_tried_again_and_keep_their_message() -> None:
    calls = []

    def attend(request: pb.AttendRequest, context: grpc.ServicerContext) -> pb.AttendResponse:
        calls.append(request)
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue: 4 requests are waiting")
        raise AssertionError

    with served(attend) as address, AttentionClient(address) as client:
        with pytest.raises(ResourceExhaustedError, match="queue: 4 requests") as caught:
            client.attend(Q, Q, Q, model="m")
        assert caught.value.method == "Attend"
    assert len(calls) == 1


def test_a_timeout_is_a_deadline() -> None:
    import time

    def attend(request: pb.AttendRequest, context: grpc.ServicerContext) -> pb.AttendResponse:
        time.sleep(1)
        return pb.AttendResponse()

    with (
        served(attend) as address,
        AttentionClient(address) as client,
        pytest.raises(DeadlineExceededError),
    ):
        client.attend(Q, Q, Q, model="m", timeout=0.1)


def test_no_server_is_unavailable() -> None:
    with AttentionClient("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        client.attend(Q, Q, Q, model="m", timeout=0.5)


def test_every_grpc_status_has_an_exception_that_keeps_it() -> None:
    for code in grpc.StatusCode:
        if code is not grpc.StatusCode.OK:
            message = pb.Error(code=code.value[0], message="text", retry_after=250_000)
            error = _errors.from_stream_error(message, "Attend")
            assert isinstance(error, AttnserveError)
            assert (error.code, error.message, error.retry_after) == (code, "text", 0.25)


def test_wrong_arguments_never_leave_the_process() -> None:
    with AttentionClient("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match="key: dtype complex128 cannot be sent"):
            client.attend(Q, Q.astype(complex), Q, model="m")
        with pytest.raises(TypeError, match="inputs: given 'one text', of type str"):
            client.attend_tokens("one text", model="m")
        with pytest.raises(TypeError, match="cannot be mixed"):
            client.attend_tokens(["text", [1, 2]], model="m")
        with pytest.raises(ValueError, match="top_k: given -1"):
            client.attend(Q, Q, Q, model="m", top_k=-1)


def test_a_future_that_somebody_tries_to_cancel_takes_no_other_with_it() -> None:
    class Service(pb_grpc.AttentionServiceServicer):
        def AttendStream(self, requests, context):  # type: ignore[no-untyped-def]  # noqa: N802
            announced = [r.request_id for r in requests if r.WhichOneof("body") == "request"]
            for number in announced:
                yield pb.AttendStreamResponse(request_id=number, response=pb.AttendResponse())

    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_AttentionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with AttentionClient(f"127.0.0.1:{port}") as client:
        with client.stream() as stream:
            futures = [stream.submit(Q, Q, Q, model="m") for _ in range(2)]
            assert not futures[0].cancel()
        for future in futures:
            future.result(5)
    server.stop(0).wait()


def test_a_stream_that_cannot_be_read_fails_its_futures() -> None:
    class Service(pb_grpc.AttentionServiceServicer):
        def AttendStream(self, requests, context):  # type: ignore[no-untyped-def]  # noqa: N802
            next(requests)
            yield pb.AttendStreamResponse(request_id=99, response=pb.AttendResponse())
            context.cancelled = threading.Event()
            context.add_callback(context.cancelled.set)
            context.cancelled.wait(10)

    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_AttentionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with AttentionClient(f"127.0.0.1:{port}") as client, client.stream() as stream:
        future = stream.submit(Q, Q, Q, model="m")
        with pytest.raises(InternalError, match="cannot be read"):
            future.result(5)
    server.stop(0).wait()


def test_metadata_goes_with_every_call() -> None:
    seen: dict[str, dict[str, str | bytes]] = {}

    class Service(pb_grpc.AttentionServiceServicer):
        def ListModels(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
            seen["ListModels"] = dict(context.invocation_metadata())
            return pb.ListModelsResponse()

        def Attend(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
            seen["Attend"] = dict(context.invocation_metadata())
            return pb.AttendResponse()

        def AttendStream(self, requests, context):  # type: ignore[no-untyped-def]  # noqa: N802
            seen["AttendStream"] = dict(context.invocation_metadata())
            for request in requests:
                yield pb.AttendStreamResponse(
                    request_id=request.request_id, response=pb.AttendResponse()
                )

        def Decode(self, requests, context):  # type: ignore[no-untyped-def]  # noqa: N802
            seen["Decode"] = dict(context.invocation_metadata())
            for request in requests:
                opened = pb.OpenedSessions(sessions=[pb.SessionState(session_id="s")])
                yield pb.DecodeResponse(request_id=request.request_id, opened=opened)

    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_AttentionServiceServicer_to_server(Service(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    options: ClientOptions = {"metadata": {"x-caller": "me", "x-bin": b"\0\1"}}

    async def main() -> None:
        async with AsyncAttentionClient(address, **options) as client:
            await client.list_models()
            await client.attend(Q, Q, Q, model="m")
            async with client.stream() as stream:
                await stream.submit(Q, Q, Q, model="m")
            await client.session("m", num_layers=1, max_tokens=1)

    def blocking() -> None:
        with AttentionClient(address, **options) as client:
            client.list_models()
            client.attend(Q, Q, Q, model="m")
            with client.stream() as stream:
                stream.submit(Q, Q, Q, model="m").result(5)
            client.session("m", num_layers=1, max_tokens=1)

    for calls in (blocking, lambda: asyncio.run(main())):
        seen.clear()
        calls()
        assert set(seen) == {"ListModels", "Attend", "AttendStream", "Decode"}
        for metadata in seen.values():
            assert (metadata["x-caller"], metadata["x-bin"]) == ("me", b"\0\1")
    server.stop(0).wait()
