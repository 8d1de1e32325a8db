"""The SDK's calls belong to OpenTelemetry's current span, and its errors say so."""

import asyncio
import copy
import pickle
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import serving
from attnserve_client import AsyncAttentionClient, AttentionClient, NotFoundError
from attnserve_server.app import AttentionServer
from collector import Collector, collecting
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span

ARRAYS = [np.zeros((1, 4, 3, 8), np.float32)] * 3
tracer = TracerProvider().get_tracer("test")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[AttentionServer]:
    models = serving.write_causal(tmp_path_factory.mktemp("models"))
    with serving.serving(
        models, trace_endpoint=f"http://{collector.address}", trace_sample=0.0
    ) as running:
        yield running


@pytest.fixture(scope="module")
def target(traced: AttentionServer) -> str:
    return f"127.0.0.1:{traced.port}"


def ids(span: Span) -> tuple[str, str]:
    context = span.get_span_context()
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def check_child(collector: Collector, span: Span, method: str) -> None:
    trace_id, span_id = ids(span)
    (call,) = [each for each in collector.trace(trace_id) if each.kind == 2]
    assert call.parent_id == span_id
    assert call.name == f"attnserve.v1.AttentionService/{method}"


def test_a_call_is_a_child_of_the_current_span(target: str, collector: Collector) -> None:
    with AttentionClient(target) as client:
        with tracer.start_as_current_span("call") as span:
            client.attend(*ARRAYS, model="causal")
        check_child(collector, span, "Attend")
        with tracer.start_as_current_span("control") as span:
            client.list_models()
        check_child(collector, span, "ListModels")
        with tracer.start_as_current_span("stream") as span, client.stream() as stream:
            stream.submit(*ARRAYS, model="causal").result()
        check_child(collector, span, "AttendStream")
        with tracer.start_as_current_span("put") as span:
            client.put_tensor(ARRAYS[0])
        check_child(collector, span, "PutTensor")


def test_sessions_belong_to_the_span_in_which_their_stream_began(
    target: str, collector: Collector
) -> None:
    token = np.zeros((1, 4, 8), np.float32)
    with (
        AttentionClient(target) as client,
        tracer.start_as_current_span("session") as span,
        client.session("causal", num_layers=1, max_tokens=4) as session,
    ):
        session.attend(0, token, token, token)
    check_child(collector, span, "Decode")


def test_in_asyncio_each_task_has_its_own(target: str, collector: Collector) -> None:
    spans: list[Span] = []

    async def call(client: AsyncAttentionClient) -> None:
        with tracer.start_as_current_span("task") as span:
            spans.append(span)
            await asyncio.sleep(0.01)
            await client.attend(*ARRAYS, model="causal")

    async def all_calls() -> None:
        async with AsyncAttentionClient(target) as client:
            await asyncio.gather(*(call(client) for _ in range(4)))
            with tracer.start_as_current_span("stream") as span:
                async with client.stream() as stream:
                    await stream.submit(*ARRAYS, model="causal")
            check_child(collector, span, "AttendStream")

    asyncio.run(all_calls())
    assert len(spans) == 4
    for span in spans:
        check_child(collector, span, "Attend")


def test_a_traceparent_that_is_given_goes_before(target: str, collector: Collector) -> None:
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    metadata = {"traceparent": f"00-{trace_id}-{span_id}-01"}
    with (
        AttentionClient(target, metadata=metadata) as client,
        tracer.start_as_current_span("other"),
    ):
        client.attend(*ARRAYS, model="causal")
        with pytest.raises(NotFoundError) as raised:
            client.attend(*ARRAYS, model="none")
    assert raised.value.trace_id == trace_id
    calls = [each for each in collector.trace(trace_id, 2) if each.kind == 2]
    assert {each.parent_id for each in calls} == {span_id}


def test_errors_say_their_trace(target: str) -> None:
    with AttentionClient(target) as client:
        with tracer.start_as_current_span("call") as span:
            with pytest.raises(NotFoundError) as raised:
                client.attend(*ARRAYS, model="none")
            with client.stream() as stream:
                failed = stream.submit(*ARRAYS, model="none")
        assert raised.value.trace_id == ids(span)[0]
        assert str(raised.value).endswith(f" (trace {ids(span)[0]})")
        streamed = failed.exception()
        assert isinstance(streamed, NotFoundError)
        assert streamed.trace_id == ids(span)[0]
        for copied in (copy.copy(raised.value), pickle.loads(pickle.dumps(raised.value))):
            assert str(copied) == str(raised.value)
        with pytest.raises(NotFoundError) as untraced:
            client.attend(*ARRAYS, model="none")
        assert untraced.value.trace_id is None
        assert "trace" not in str(untraced.value)

    async def awaited() -> tuple[NotFoundError, Span]:
        async with AsyncAttentionClient(target) as client:
            with tracer.start_as_current_span("call") as span:
                with pytest.raises(NotFoundError) as raised:
                    await client.attend(*ARRAYS, model="none")
                return raised.value, span

    error, span = asyncio.run(awaited())
    assert error.trace_id == ids(span)[0]


def test_without_opentelemetry_nothing_is_missing(target: str, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "import numpy as np\n"
        "from attnserve_client import AttentionClient\n"
        "arrays = [np.zeros((1, 4, 3, 8), np.float32)] * 3\n"
        "with AttentionClient(sys.argv[1]) as client:\n"
        "    print(client.attend(*arrays, model='causal').output.shape)\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script), target], capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "(1, 4, 3, 8)\n", ended.stderr
