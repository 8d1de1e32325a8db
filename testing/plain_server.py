"""A real grpc server that answers every call of the API but Decode, as it is told."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc


class Service(pb_grpc.AttentionServiceServicer):
    """Answers everything; each call begins with `before`, given the method and its context."""

    def __init__(self, before: Callable[[str, grpc.ServicerContext], None]) -> None:
        for method, answer in (
            ("Attend", lambda request: pb.AttendResponse(model=request.model)),
            ("AttendTokens", lambda request: pb.AttendTokensResponse()),
            ("PutTensor", lambda requests: pb.StoredTensor(handle=str(len(list(requests))))),
            ("RenewTensor", lambda request: pb.StoredTensor()),
            ("DropTensor", lambda request: pb.DropTensorResponse()),
            ("ListModels", lambda request: pb.ListModelsResponse()),
            ("GetModel", lambda request: pb.GetModelResponse()),
            ("ServerInfo", lambda request: pb.ServerInfoResponse()),
        ):
            setattr(self, method, self._method(method, before, answer))
        self._before = before

    @staticmethod
    def _method(
        name: str, before: Callable[[str, grpc.ServicerContext], None], answer: Callable[[Any], Any]
    ) -> Callable[[Any, grpc.ServicerContext], Any]:
        def method(request: Any, context: grpc.ServicerContext) -> Any:
            before(name, context)
            return answer(request)

        return method

    def AttendStream(  # noqa: N802
        self, requests: Iterator[pb.AttendStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AttendStreamResponse]:
        """Answer the first request."""
        first = next(requests)
        self._before("AttendStream", context)
        for _ in requests:
            pass
        yield pb.AttendStreamResponse(request_id=first.request_id, response=pb.AttendResponse())


def start(
    before: Callable[[str, Any], None] = lambda *_: None, port: int = 0, host: str = "127.0.0.1"
) -> tuple[Any, int]:
    """A server, and where it listens."""
    server = grpc.server(ThreadPoolExecutor(20))
    pb_grpc.add_AttentionServiceServicer_to_server(Service(before), server)
    bound = server.add_insecure_port(f"{host}:{port}")
    server.start()
    return server, bound


@contextmanager
def served(
    before: Callable[[str, Any], None] = lambda *_: None, port: int = 0, host: str = "127.0.0.1"
) -> Iterator[str]:
    """The address of a server."""
    server, bound = start(before, port, host)
    yield f"{host}:{bound}"
    server.stop(0).wait()
