"""A server that answers Attend after a fixed time, one request after another.

Servers that compute share this machine's cores: three of them have no more of it than one. This one
takes no core while it "computes", so that what a client makes of several servers can be seen.
"""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from attnserve_proto import attention_pb2 as pb


def main() -> None:
    """Serve until ended; the argument is the time of a request, milliseconds."""
    seconds = float(sys.argv[1]) / 1e3
    answer = pb.AttendResponse(model="causal").SerializeToString()
    turn = threading.Lock()

    def attend(message: bytes, context: grpc.ServicerContext) -> bytes:
        with turn:
            time.sleep(seconds)
        return answer

    server = grpc.server(ThreadPoolExecutor(64))
    methods = {"Attend": grpc.unary_unary_rpc_method_handler(attend, None, None)}
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("attnserve.v1.AttentionService", methods)]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
