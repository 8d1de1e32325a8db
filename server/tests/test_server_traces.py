"""Traces: a real collector hears of real calls, as their callers' spans' children."""

import itertools
import json
import logging
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import serving
import tritonclient.grpc as triton
from attnserve_client import AttentionClient
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Settings
from collector import Collector, Span, collecting
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

SERVER, INTERNAL = 2, 1
COMPUTED = ["admission", "receive", "check", "queue", "batch", "compute", "answer"]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def traced(repository: Path, collector: Collector) -> Iterator[AttentionServer]:
    """A server that traces what callers ask it to, and nothing by itself."""
    options = {"trace_endpoint": f"http://{collector.address}", "trace_sample": 0.0}
    with serving.serving(
        repository, metrics_port=0, max_traces_per_second=10_000, **options
    ) as running:
        yield running


class Context:
    """A caller's span."""

    def __init__(self, sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        self.header = f"00-{self.trace_id}-{self.span_id}-{int(sampled):02}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("traceparent", self.header),)


def request(length: int = 5, model: str = "causal") -> pb.AttendRequest:
    shape = [1, 4, length, 8]
    tensor = pb.Tensor(dtype=pb.FP32, shape=shape, data=bytes(4 * int(np.prod(shape))))
    return pb.AttendRequest(model=model, query=tensor, key=tensor, value=tensor)


def call_of(spans: list[Span]) -> Span:
    (found,) = [span for span in spans if span.kind == SERVER]
    return found


def phases_of(spans: list[Span], parent: Span) -> list[str]:
    """The names of its phases, which follow one another without a gap."""
    children = [s for s in spans if s.parent_id == parent.span_id and "/" not in s.name]
    children.sort(key=lambda span: (span.start, span.end))
    assert children[0].start == parent.start
    assert children[-1].end == parent.end
    for before, after in itertools.pairwise(children):
        assert before.end == after.start
    return [span.name for span in children]


def attend_on(channel: grpc.Channel, context: Context, length: int = 5) -> None:
    pb_grpc.AttentionServiceStub(channel).Attend(request(length), metadata=context.metadata)


@pytest.fixture
def channel(traced: AttentionServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{traced.port}") as opened:
        yield opened


def test_a_call_is_its_callers_child_with_all_its_phases(
    channel: grpc.Channel, collector: Collector
) -> None:
    context = Context()
    before = time.time_ns()
    metadata = (*context.metadata, ("tracestate", "vendor=x,other=y"), ("x-request-id", "mine"))
    pb_grpc.AttentionServiceStub(channel).Attend(request(7), metadata=metadata)
    spans = collector.trace(context.trace_id)
    call = call_of(spans)
    assert call.name == "attnserve.v1.AttentionService/Attend"
    assert call.parent_id == context.span_id
    assert call.state == "vendor=x,other=y"
    assert call.status == 0
    assert before <= call.start <= call.end <= time.time_ns()
    assert phases_of(spans, call) == COMPUTED
    variant = call.attributes.pop("attnserve.variant")
    assert variant
    assert call.attributes == {
        "rpc.system": "grpc",
        "rpc.service": "attnserve.v1.AttentionService",
        "rpc.method": "Attend",
        "rpc.grpc.status_code": 0,
        "client.address": "127.0.0.1",
        "attnserve.request_id": "mine",
        "attnserve.model": "causal",
        "attnserve.model_version": 1,
        "attnserve.sequences": 1,
        "attnserve.batch_sequences": 1,
        "attnserve.query_len": 7,
        "attnserve.key_len": 7,
    }
    (resource, *_) = collector.resources
    assert resource["service.name"] == "attnserve"


def test_a_call_that_fails_says_how(channel: grpc.Channel, collector: Collector) -> None:
    context = Context()
    with pytest.raises(grpc.RpcError):
        pb_grpc.AttentionServiceStub(channel).Attend(
            request(model="none"), metadata=context.metadata
        )
    spans = collector.trace(context.trace_id)
    call = call_of(spans)
    assert call.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert call.status == 0  # the caller's fault, not the server's
    assert phases_of(spans, call) == ["admission", "receive", "check"]


def test_what_is_not_to_be_traced_is_not(
    channel: grpc.Channel, collector: Collector, traced: AttentionServer
) -> None:
    recorded = traced.plane.records()[0]
    stub = pb_grpc.AttentionServiceStub(channel)
    stub.Attend(request())
    attend_on(channel, Context(sampled=False))
    for broken in ("00-zz", f"00-{'0' * 32}-{'1' * 16}-01", f"ff-{'1' * 32}-{'1' * 16}-01"):
        stub.Attend(request(), metadata=(("traceparent", broken),))
    assert traced.plane.records()[0] == recorded


def test_requests_of_a_stream_are_children_of_its_call(
    channel: grpc.Channel, collector: Collector
) -> None:
    context = Context()
    messages = [
        pb.AttendStreamRequest(request_id=1, request=request()),
        pb.AttendStreamRequest(request_id=2, request=request(model="none")),
        pb.AttendStreamRequest(request_id=3, request=request(9)),
    ]
    stream = pb_grpc.AttentionServiceStub(channel).AttendStream(
        iter(messages), metadata=context.metadata
    )
    assert len(list(stream)) == 3
    spans = collector.trace(context.trace_id)
    call = call_of(spans)
    assert call.name == "attnserve.v1.AttentionService/AttendStream"
    children = {
        s.attributes["attnserve.request_id"]: s for s in spans if s.name.endswith("request")
    }
    assert set(children) == {"1", "2", "3"}
    for child in children.values():
        assert child.parent_id == call.span_id
        assert child.kind == INTERNAL
    assert phases_of(spans, children["1"]) == COMPUTED
    assert phases_of(spans, children["3"]) == COMPUTED
    assert children["3"].attributes["attnserve.key_len"] == 9
    assert children["2"].attributes["rpc.grpc.status_code"] == 5
    assert "compute" not in phases_of(spans, children["2"])


def test_layers_of_a_session_are_children_of_the_decode_call(
    traced: AttentionServer, collector: Collector
) -> None:
    context = Context()
    address = f"127.0.0.1:{traced.port}"
    with (
        AttentionClient(address, metadata=context.metadata) as client,
        client.session("causal", num_layers=1, max_tokens=16) as session,
    ):
        for _ in range(3):
            token = np.zeros((1, 4, 8), np.float32)
            session.attend(0, token, token, token)
    spans = collector.trace(context.trace_id)
    calls = {s.span_id: s for s in spans if s.kind == SERVER}
    layers = [s for s in spans if s.name.endswith("Decode request")]
    assert len(layers) == 3
    for number, layer in enumerate(layers, 1):
        assert calls[layer.parent_id].name.endswith("/Decode")
        assert phases_of(spans, layer) == COMPUTED
        assert layer.attributes["attnserve.variant"] == "paged"
        assert layer.attributes["attnserve.key_len"] == number
        assert layer.attributes["attnserve.query_len"] == 1


def test_texts_are_made_tokens_within_their_call(
    channel: grpc.Channel, collector: Collector
) -> None:
    context = Context()
    asked = pb.AttendTokensRequest(model="bert", text=pb.TextBatch(texts=["w1 w2 w3"]))
    pb_grpc.AttentionServiceStub(channel).AttendTokens(asked, metadata=context.metadata)
    spans = collector.trace(context.trace_id)
    call = call_of(spans)
    assert phases_of(spans, call) == [
        "admission", "receive", "wait", "tokenize", "queue", "batch", "compute", "answer",
    ]  # fmt: skip
    assert call.attributes["attnserve.model"] == "bert"
    assert call.attributes["attnserve.query_len"] == 5


def test_the_open_inference_protocol_is_traced(
    traced: AttentionServer, collector: Collector
) -> None:
    once, streamed = Context(), Context()
    inputs = [triton.InferInput(name, [1, 4, 5, 8], "FP32") for name in ("query", "key", "value")]
    for each in inputs:
        each.set_data_from_numpy(np.ones(each.shape(), np.float32))
    answers: list[InferenceServerException | None] = []
    came = threading.Event()

    def take(result: object, error: InferenceServerException | None) -> None:
        answers.append(error)
        came.set()

    with triton.InferenceServerClient(f"127.0.0.1:{traced.port}") as client:
        client.infer("causal", inputs, request_id="seven", headers=dict(once.metadata))
        client.start_stream(take, headers=dict(streamed.metadata))
        client.async_stream_infer("causal", inputs, request_id="eight")
        assert came.wait(20)
        client.stop_stream()
    assert answers == [None]
    spans = collector.trace(once.trace_id)
    assert call_of(spans).attributes["attnserve.request_id"] == "seven"
    assert phases_of(spans, call_of(spans)) == COMPUTED
    spans = collector.trace(streamed.trace_id)
    (child,) = [
        s for s in spans if s.name == "inference.GRPCInferenceService/ModelStreamInfer request"
    ]
    assert child.attributes["attnserve.request_id"] == "eight"
    # Its message is its beginning.
    assert phases_of(spans, child) == [name for name in COMPUTED if name != "receive"]


def test_methods_of_the_control_plane_are_traced(
    channel: grpc.Channel, collector: Collector
) -> None:
    context = Context()
    pb_grpc.AttentionServiceStub(channel).ListModels(
        pb.ListModelsRequest(), metadata=context.metadata
    )
    spans = collector.trace(context.trace_id)
    assert phases_of(spans, call_of(spans)) == ["admission", "receive", "wait", "handle"]


def openmetrics(port: int) -> str:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0; charset=utf-8"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=accept)
    with urllib.request.urlopen(asked, timeout=10) as page:
        text: str = page.read().decode()
    return text


def test_buckets_of_latencies_name_a_trace(
    channel: grpc.Channel, collector: Collector, traced: AttentionServer
) -> None:
    contexts = [Context() for _ in range(20)]
    for context in contexts:
        attend_on(channel, context)
    spans = [call_of(collector.trace(context.trace_id)) for context in contexts]
    assert traced.metrics_port is not None
    families = text_string_to_metric_families(openmetrics(traced.metrics_port))
    (seconds,) = [each for each in families if each.name == "attnserve_request_seconds"]
    found = [
        sample
        for sample in seconds.samples
        if sample.labels["model"] == "causal" and sample.exemplar is not None
    ]
    assert {sample.labels["part"] for sample in found} == {"deserialize", "queue", "compute"}
    known = {span.trace_id: span for span in collector.spans if span.kind == SERVER}
    last = {(sample.labels["variant"], sample.labels["part"]): sample for sample in found}
    assert spans[-1].trace_id in {sample.exemplar.labels["trace_id"] for sample in found}
    assert last
    for sample in found:
        assert sample.exemplar.labels["trace_id"] in known
        assert sample.exemplar.value <= float(sample.labels["le"])
    # For who does not ask for them there are none.
    with urllib.request.urlopen(f"http://127.0.0.1:{traced.metrics_port}/metrics") as page:
        assert b"trace_id" not in page.read()


def test_tritons_users_are_told_how_traces_are_set(
    traced: AttentionServer, server: AttentionServer, collector: Collector
) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{traced.port}") as client:
        told = client.get_trace_settings("causal", as_json=True)["settings"]
        assert {name: values["value"] for name, values in told.items()} == {
            "trace_level": ["TIMESTAMPS"],
            "trace_rate": ["0"],
            "trace_count": ["-1"],
            "trace_mode": ["opentelemetry"],
            "opentelemetry,url": [f"http://{collector.address}"],
            "max_traces_per_second": ["10000"],
        }
        with pytest.raises(InferenceServerException, match="--trace-endpoint"):
            client.update_trace_settings(settings={"trace_rate": "1"})
        with pytest.raises(InferenceServerException, match="none"):
            client.get_trace_settings("none")
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        told = client.get_trace_settings(as_json=True)["settings"]
        assert told == {"trace_level": {"value": ["OFF"]}}


def test_a_flood_of_traces_is_bounded(repository: Path, collector: Collector) -> None:
    context = Context()
    with serving.serving(
        repository, trace_endpoint=f"http://{collector.address}", max_traces_per_second=5
    ) as server:
        began = time.monotonic()
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            for _ in range(200):
                attend_on(channel, context)
        most = 5 + 5 * (time.monotonic() - began)
        recorded, refused, _ = server.plane.records()
    assert 1 <= recorded <= most
    assert recorded + refused == 200
    assert len(collector.trace(context.trace_id, recorded)) <= 9 * most


def test_some_calls_are_traced_though_nobody_asks(repository: Path) -> None:
    with (
        collecting() as collector,
        serving.serving(
            repository, trace_endpoint=f"http://{collector.address}", trace_sample=1.0
        ) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        for _ in range(3):
            pb_grpc.AttentionServiceStub(channel).Attend(request())
        spans = collector.wait(lambda spans: sum(s.kind == SERVER for s in spans) == 3)
        assert len({s.trace_id for s in spans}) == 3
        assert all(s.parent_id == "" for s in spans if s.kind == SERVER)
        attend_on(channel, Context(sampled=False))
        assert server.plane.records()[0] == 3


def test_a_collector_that_is_away_harms_nothing(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with serving.serving(
        repository,
        trace_endpoint=f"http://127.0.0.1:{port}",
        trace_sample=1.0,
        max_traces_per_second=100_000,
    ) as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            for _ in range(300):
                attend_on(channel, Context())
        recorded = server.plane.records()[0]
        assert recorded == 300
        began = time.monotonic()
    # Nor does it keep the server from ending.
    assert time.monotonic() - began < 15
    assert sum("traces are not taken" in record.message for record in caplog.records) <= 1


def test_it_is_said_why_a_collector_takes_nothing(
    repository: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", "none.pem")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # seconds of a try

    address = f"127.0.0.1:{serving.free_port()}"

    def told(message: str) -> list[logging.LogRecord]:
        """Not of servers of other tests, which may still be ending."""
        records = [record for record in caplog.records if message in record.message]
        return [each for each in records if address in each.__dict__.get("endpoint", address)]

    with (
        serving.serving(repository, trace_endpoint=f"https://{address}") as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        assert told("none.pem")
        attend_on(channel, Context())
        assert serving.eventually(lambda: bool(told("traces are not taken")), 20)
    (record,) = told("traces are not taken")
    assert f"traces to {address}" in record.__dict__["said"]


def test_a_collector_that_comes_later_is_heard(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with (
        serving.serving(repository, trace_endpoint=f"http://127.0.0.1:{port}") as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        attend_on(channel, Context())
        with collecting(port) as collector:
            deadline = time.monotonic() + 60
            while not collector.spans and time.monotonic() < deadline:
                attend_on(channel, Context())
                time.sleep(0.5)
            assert collector.spans


def test_without_a_collector_nothing_is_recorded(server: AttentionServer, address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        attend_on(channel, Context())
    assert server.plane.records() == (0, 0, 0)


def test_logs_of_a_request_name_its_trace(repository: Path, tmp_path: Path) -> None:
    """A request that meets a fault of the server: its handler is given one."""
    script = tmp_path / "faulty.py"
    script.write_text(
        "import sys\n"
        "from attnserve_server.handlers import attention\n"
        "def broken(self, message, request): raise RuntimeError('broken')\n"
        "attention.AttentionHandlers.list_models = broken\n"
        "from attnserve_server.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    context = Context()
    command = [sys.executable, str(script), "--repository", str(repository), "--port", "0"]
    with subprocess.Popen(
        [*command, "--metrics-port", "-1", "--provider", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split("listening on ")[1].split()[0]
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as raised:
            pb_grpc.AttentionServiceStub(channel).ListModels(
                pb.ListModelsRequest(), metadata=context.metadata
            )
        assert raised.value.code() == grpc.StatusCode.INTERNAL
        process.terminate()
        _, errors = process.communicate(timeout=30)
    lines = [json.loads(line) for line in errors.splitlines()]
    (line,) = [each for each in lines if each["message"] == "request failed"]
    assert line["trace_id"] == context.trace_id
    assert line["span_id"] == context.span_id
    assert all("trace_id" not in each for each in lines if each is not line)


def test_who_wants_traces_without_opentelemetry_is_told(repository: Path, tmp_path: Path) -> None:
    script = tmp_path / "lacking.py"
    script.write_text(
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from attnserve_server.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(script), "--repository", str(repository), "--port", "0"]
    ended = subprocess.run(
        [*command, "--metrics-port", "-1", "--provider", "cpu", "--trace-endpoint", "a:4317"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "pip install 'attnserve-server[traces]'" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("collector:4317", "http://collector:4317"),
        ("http://127.0.0.1:4317", "http://127.0.0.1:4317"),
        ("https://[::1]:4317", "https://[::1]:4317"),
    ],
)
def test_an_endpoint_is_read_as_it_is_meant(given: str, meant: str) -> None:
    from attnserve_server import configuration

    settings = configuration.read(["--repository", "x", "--trace-endpoint", given], {})
    assert settings.trace_endpoint == meant
    assert Settings(Path()).trace_endpoint is None
