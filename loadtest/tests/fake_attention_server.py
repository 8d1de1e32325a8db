"""A small attnserve server for tests, over real gRPC: computes nothing, keeps exact time.

Each answer takes `coefficient * (seq_len / 64) ** exponent` milliseconds and says so in its
timings, so that a load test has a truth to recover. Run as a script: it prints its address and
stops when its standard input closes.

Models: `quadratic` (core, variants `fused` and `reference`), `linear` (core), `tokens`
(transformer, max_seq_len 512, quadratic), `broken` (core; every call is RESOURCE_EXHAUSTED),
`flaky` (core; every third call is INTERNAL), `overlapping` (core; the timings of every second
answer overlap: together they are more than the whole call), `always-overlapping`.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc

NUM_HEADS, HEAD_DIM, EMBED_DIM = 1, 8, 8
EXPONENTS = {
    "quadratic": 2.0,
    "linear": 1.0,
    "tokens": 2.0,
    "broken": 1.0,
    "flaky": 1.0,
    "overlapping": 1.0,
    "always-overlapping": 1.0,
}
COEFFICIENT_MS = {"fused": 1.5, "reference": 3.0}
VARIANTS = ("fused", "reference")


def compute_ms(model: str, variant: str, seq_len: int) -> float:
    return COEFFICIENT_MS[variant] * (seq_len / 64) ** EXPONENTS[model]


def describe(name: str) -> pb.Model:
    is_tokens = name == "tokens"
    return pb.Model(
        name=name,
        version="1",
        kind=pb.TRANSFORMER if is_tokens else pb.CORE,
        dtype=pb.FP32,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        value_head_dim=HEAD_DIM,
        mask=pb.CAUSAL,
        embed_dim=EMBED_DIM if is_tokens else 0,
        vocab_size=1000 if is_tokens else 0,
        max_seq_len=512 if is_tokens else 0,
        variants=[pb.Variant(name=variant) for variant in VARIANTS],
    )


class FakeAttention(pb_grpc.AttentionServiceServicer):
    def __init__(self) -> None:
        self._calls = itertools.count(1)

    def _work(
        self, model: str, variant: str, seq_len: int, batch: int, context: grpc.ServicerContext
    ) -> tuple[str, pb.Timings]:
        if model not in EXPONENTS:
            context.abort(grpc.StatusCode.NOT_FOUND, f"model: {model!r} is not served")
        if model == "broken":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue: full")
        if model == "flaky" and next(self._calls) % 3 == 0:
            context.abort(grpc.StatusCode.INTERNAL, "fault on purpose")
        variant = variant or VARIANTS[0]
        overlaps = model == "always-overlapping" or (
            model == "overlapping" and next(self._calls) % 2 == 0
        )
        milliseconds = compute_ms(model, variant, seq_len)
        time.sleep(milliseconds / 1e3)
        timings = pb.Timings(
            deserialize=20,
            queue=10_000_000 if overlaps else 30,
            compute=round(milliseconds * 1e3),
            serialize=10,
            batch_size=batch,
        )
        return variant, timings

    def Attend(  # noqa: N802
        self, request: pb.AttendRequest, context: grpc.ServicerContext
    ) -> pb.AttendResponse:
        batch, _, seq_len, _ = request.query.shape
        variant, timings = self._work(request.model, request.variant, seq_len, batch, context)
        answer = pb.AttendResponse(
            model=request.model, version="1", variant=variant, timings=timings
        )
        answer.output.CopyFrom(request.value)
        return answer

    def AttendStream(  # noqa: N802
        self, request_iterator: Iterator[pb.AttendStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AttendStreamResponse]:
        first = next(request_iterator)
        chunks = [message.chunk for message in request_iterator]
        request = first.request
        batch, _, seq_len, _ = request.query.shape
        variant, timings = self._work(request.model, request.variant, seq_len, batch, context)
        answer = pb.AttendResponse(
            model=request.model, version="1", variant=variant, timings=timings
        )
        answer.output.CopyFrom(request.value)
        yield pb.AttendStreamResponse(request_id=first.request_id, response=answer)
        value_field = pb.AttendRequest.VALUE_FIELD_NUMBER
        for chunk in chunks:
            if chunk.tensor == value_field:
                chunk.tensor = pb.AttendResponse.OUTPUT_FIELD_NUMBER
                yield pb.AttendStreamResponse(request_id=first.request_id, chunk=chunk)

    def AttendTokens(  # noqa: N802
        self, request: pb.AttendTokensRequest, context: grpc.ServicerContext
    ) -> pb.AttendTokensResponse:
        sequences = [list(sequence.ids) for sequence in request.tokens.sequences]
        seq_len = max(len(ids) for ids in sequences)
        variant, timings = self._work(
            request.model, request.variant, seq_len, len(sequences), context
        )
        results = [
            pb.SequenceResult(
                ids=ids,
                hidden=pb.Tensor(
                    dtype=pb.FP32,
                    shape=[len(ids), EMBED_DIM],
                    data=np.zeros((len(ids), EMBED_DIM), np.float32).tobytes(),
                ),
            )
            for ids in sequences
        ]
        return pb.AttendTokensResponse(
            model=request.model, version="1", variant=variant, sequences=results, timings=timings
        )

    def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[describe(name) for name in sorted(EXPONENTS)])

    def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: grpc.ServicerContext
    ) -> pb.GetModelResponse:
        if request.name not in EXPONENTS:
            context.abort(grpc.StatusCode.NOT_FOUND, f"model: {request.name!r} is not served")
        return pb.GetModelResponse(model=describe(request.name), manifest_json="{}")

    def ServerInfo(  # noqa: N802
        self, request: pb.ServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.ServerInfoResponse:
        return pb.ServerInfoResponse(
            name="attnserve",
            version="0.0.fake",
            onnxruntime_version="none",
            providers=["FakeExecutionProvider"],
            limits=pb.Limits(
                max_message_bytes=1 << 26,
                max_request_bytes=1 << 28,
                max_response_bytes=1 << 28,
                max_seq_len=65536,
                max_batch=64,
                chunk_bytes=1 << 20,
                max_queue=64,
            ),
            state="serving",
        )


def main() -> None:
    server = grpc.server(
        futures.ThreadPoolExecutor(16),
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    pb_grpc.add_AttentionServiceServicer_to_server(FakeAttention(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    sys.stdin.read()  # until whoever started this closes it or ends
    server.stop(grace=0.2).wait()


if __name__ == "__main__":
    main()
