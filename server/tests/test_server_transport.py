"""Connections: addresses, TLS, pings, idleness, and messages that are none."""

import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import certificates
import grpc
import http2
import pytest
import serving
from attnserve_client import AttentionClient
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from tritonclient.grpc import service_pb2 as oip


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_causal(tmp_path_factory.mktemp("transport"))


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[AttentionServer]:
    with serving.serving(repository) as running:
        yield running


@pytest.fixture
def channel(server: AttentionServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened


def attend(channel: grpc.Channel, timeout: float = 10) -> str:
    stub = pb_grpc.AttentionServiceStub(channel)
    return stub.Attend(serving.attend_request(), timeout=timeout).model


# Addresses


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_ipv6(repository: Path, host: str) -> None:
    with serving.serving(repository, host=host, metrics_port=0, insecure=True) as server:
        with grpc.insecure_channel(f"[::1]:{server.port}") as channel:
            assert attend(channel) == "causal"
        if host != "::":
            with AttentionClient(server.address) as client:
                assert client.list_models()
        with urllib.request.urlopen(f"http://[::1]:{server.metrics_port}/metrics") as page:
            assert page.status == 200


@pytest.mark.parametrize("abstract", [False, True])
def test_unix_sockets(repository: Path, tmp_path: Path, abstract: bool) -> None:
    path = tmp_path / "attnserve.sock"
    host = f"unix-abstract:{path.parent.name}-attnserve" if abstract else f"unix:{path}"
    with serving.serving(repository, host=host, metrics_port=0) as server:
        assert server.address == host
        with grpc.insecure_channel(host) as channel:
            assert attend(channel) == "causal"
        with AttentionClient(host, shared_memory=True) as client:
            assert client.list_models()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as page:
            assert b"attnserve_connections" in page.read()
    assert not path.exists()


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> certificates.Authority:
    return certificates.Authority(tmp_path_factory.mktemp("authority"))


def test_tls(repository: Path, authority: certificates.Authority) -> None:
    own = authority.issue("server")
    options = {"tls_certificate": own.certificate, "tls_key": own.key}
    with serving.serving(repository, **options) as server:
        address = f"127.0.0.1:{server.port}"
        trusted = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
        with grpc.secure_channel(address, trusted) as channel:
            assert attend(channel) == "causal"
        for options in ({"credentials": trusted}, {"root_certificates": authority.certificate}):
            with AttentionClient(address, **options) as client:
                assert client.list_models()
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
            attend(channel)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        with grpc.secure_channel(address, trusted) as channel:
            assert attend(channel) == "causal"


def test_metrics_are_encrypted_where_calls_are(
    repository: Path, authority: certificates.Authority
) -> None:
    own = authority.issue("server")
    options = {"tls_certificate": own.certificate, "tls_key": own.key, "metrics_port": 0}
    trusting = ssl.create_default_context(cafile=authority.certificate)
    with serving.serving(repository, **options) as server:
        place = f"127.0.0.1:{server.metrics_port}/metrics"
        with urllib.request.urlopen(f"https://{place}", timeout=5, context=trusting) as answer:
            assert b"attnserve_kv_sessions 0" in answer.read()
        with pytest.raises(OSError, match=r"closed|reset"):
            urllib.request.urlopen(f"http://{place}", timeout=5)


def test_mutual_tls(repository: Path, authority: certificates.Authority, tmp_path: Path) -> None:
    own = authority.issue("server")
    stranger = certificates.Authority(tmp_path).issue("client")
    options = {
        "tls_certificate": own.certificate,
        "tls_key": own.key,
        "tls_client_authorities": authority.certificate,
    }
    root = authority.certificate.read_bytes()
    with serving.serving(repository, **options) as server:
        address = f"127.0.0.1:{server.port}"
        for identity in (None, stranger):
            pair = (None, None) if identity is None else identity.pem()
            refused = grpc.ssl_channel_credentials(root, *pair)
            with grpc.secure_channel(address, refused) as channel:
                with pytest.raises(grpc.RpcError) as raised:
                    attend(channel)
                assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        client = authority.issue("client")
        known = grpc.ssl_channel_credentials(root, *client.pem())
        with grpc.secure_channel(address, known) as channel:
            assert attend(channel) == "causal"
        files = {"private_key": client.key, "certificate_chain": client.certificate}
        with AttentionClient(address, root_certificates=authority.certificate, **files) as caller:
            assert caller.list_models()


# Pings and idleness


def test_callers_may_ping_every_two_seconds(server: AttentionServer) -> None:
    options = [
        ("grpc.keepalive_time_ms", 2000),
        ("grpc.keepalive_timeout_ms", 2000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    until = threading.Event()

    def late() -> Iterator[pb.AttendStreamRequest]:
        yield pb.AttendStreamRequest(request_id=1, request=serving.attend_request())
        until.wait(8)
        yield pb.AttendStreamRequest(request_id=2, request=serving.attend_request())

    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
        answers = list(pb_grpc.AttentionServiceStub(channel).AttendStream(late(), timeout=30))
        assert [answer.request_id for answer in answers] == [1, 2]
        assert attend(channel) == "causal"


def test_idle_connections_are_closed(repository: Path) -> None:
    with serving.serving(repository, idle_timeout=1.0, metrics_port=0) as server:
        idle = [http2.Http2Connection(server.port) for _ in range(100)]
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        assert serving.eventually(lambda: server.plane.gauges()["connections"] == 120)
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            watching = pb_grpc.AttentionServiceStub(channel).AttendStream(iter(()))
            list(watching)  # a call that has ended keeps no connection
            for connection in idle:
                kinds = [frame.kind for frame in connection.frames()]
                assert kinds[-1] == http2.GOAWAY
                connection.socket.close()
            with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as page:
                assert page.status == 200
            assert attend(channel) == "causal"
        for quiet in silent:  # these have not even said what they speak
            quiet.close()


def test_connections_beyond_the_bound_are_closed_and_others_live_on(repository: Path) -> None:
    with (
        serving.serving(repository, max_connections_per_address=8, metrics_port=0) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        assert attend(channel) == "causal"
        within = [http2.Http2Connection(server.port) for _ in range(7)]
        assert serving.eventually(lambda: server.plane.gauges()["connections"] == 8)
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as refused:
                assert refused.recv(1) == b""
        assert attend(channel) == "causal"
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as page:
            assert page.status == 200
        for connection in within:
            connection.send(http2.headers(1, serving.HEALTH_CHECK), http2.message(1, b""))
            assert connection.answer(1)
            connection.socket.close()


# Messages that are none


@pytest.mark.parametrize(
    "path",
    [serving.HEALTH_CHECK, serving.LIST_MODELS, serving.ATTEND, serving.MODEL_INFER],
)
def test_malformed_messages_are_the_callers_fault(channel: grpc.Channel, path: str) -> None:
    for wrong in (b"\xff\xff", b"\x0a\x7fshort", b"\x0f"):
        with pytest.raises(grpc.RpcError) as refused:
            serving.raw_call(channel, path)(wrong, timeout=10)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert attend(channel) == "causal"


@pytest.mark.parametrize(
    "path",
    [
        serving.HEALTH_WATCH,
        serving.REFLECTION,
        serving.REFLECTION.replace("v1alpha", "v1"),
        serving.ATTEND_STREAM,
        serving.PUT_TENSOR,
    ],
)
def test_malformed_messages_of_streams_are_the_callers_fault(
    channel: grpc.Channel, path: str
) -> None:
    call = channel.stream_stream(path, request_serializer=None, response_deserializer=None)
    for wrong in (b"\xff\xff", b"\x0a\x7fshort", b"\x0f"):
        with pytest.raises(grpc.RpcError) as refused:
            list(call(iter([wrong]), timeout=10))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert attend(channel) == "causal"


def test_a_malformed_request_on_a_stream_of_inferences_is_answered_like_any_other(
    channel: grpc.Channel,
) -> None:
    call = channel.stream_stream(
        serving.MODEL_STREAM_INFER,
        request_serializer=None,
        response_deserializer=oip.ModelStreamInferResponse.FromString,
    )
    answers = list(call(iter([b"\xff\xff", b"\x0f"]), timeout=10))
    assert len(answers) == 2
    assert all("message: given" in answer.error_message for answer in answers)
