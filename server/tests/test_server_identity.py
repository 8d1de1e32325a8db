"""Who calls and what it may do: tokens, certificates, roles, and files that change meanwhile."""

import io
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import certificates
import grpc
import http2
import numpy as np
import pytest
import serving
from attnserve_client import (
    AttentionClient,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server import callers, cli, exposure
from attnserve_server.app import AttentionServer
from attnserve_server.logs import JsonFormatter
from attnserve_server.settings import Limits, Settings
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

BOUNDS = callers.bounds_of(Limits(), identified=True)
Code = grpc.StatusCode


class Book:
    """A file of callers, and the tokens of those in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: dict[str, str] = {}
        path.write_text("# name  roles  credential\n")

    def add(self, name: str, roles: str, *bounds: str) -> None:
        self.tokens[name], credential = callers.make_token()
        with self.path.open("a") as file:
            file.write(f"{name} {roles} {credential} {' '.join(bounds)}\n")

    def metadata(self, name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.tokens[name]}"),)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_causal(tmp_path_factory.mktemp("identity"))


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    made = Book(tmp_path_factory.mktemp("book") / "callers")
    made.add("trainer", "infer,sessions")
    made.add("reader", "infer")
    made.add("chat", "sessions")
    made.add("ops", "admin")
    made.add("nobody", "none")
    return made


@pytest.fixture(scope="module")
def server(repository: Path, book: Book) -> Iterator[AttentionServer]:
    with serving.serving(repository, callers=book.path, metrics_port=0) as running:
        yield running


@pytest.fixture
def channel(server: AttentionServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def attend(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> grpc.StatusCode:
    stub = pb_grpc.AttentionServiceStub(channel)
    request = serving.attend_request()
    return code_of(lambda: stub.Attend(request, timeout=20, metadata=metadata))


# Tokens and roles


def test_a_token_lets_its_caller_in_and_no_other_text_does(
    channel: grpc.Channel, book: Book
) -> None:
    assert attend(channel, book.metadata("trainer")) is Code.OK
    token = book.tokens["trainer"]
    wrong = ["", "Bearer", f"Bearer {token}x", f"Bearer {token[:-1]}", f"Basic {token}", token,
             f"Bearer {token},{token}"]  # fmt: skip
    for authorization in wrong:
        assert attend(channel, (("authorization", authorization),)) is Code.UNAUTHENTICATED
    assert attend(channel) is Code.UNAUTHENTICATED
    twice = book.metadata("trainer") * 2
    assert attend(channel, twice) is Code.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("trainer", {"infer", "sessions", "look"}),
        ("reader", {"infer", "look"}),
        ("chat", {"sessions", "look"}),
        ("ops", {"admin", "look"}),
        ("nobody", set()),
    ],
)
def test_roles(channel: grpc.Channel, book: Book, name: str, allowed: set[str]) -> None:
    own = pb_grpc.AttentionServiceStub(channel)
    other = oip_grpc.GRPCInferenceServiceStub(channel)
    options = {"timeout": 20, "metadata": book.metadata(name)}
    calls: dict[str, list[Callable[[], object]]] = {
        "infer": [
            lambda: own.Attend(serving.attend_request(), **options),
            lambda: list(own.AttendStream(iter(()), **options)),
        ],
        "sessions": [lambda: list(own.Decode(iter(()), **options))],
        "admin": [
            lambda: other.ModelStatistics(oip.ModelStatisticsRequest(), **options),
            lambda: other.RepositoryModelLoad(
                oip.RepositoryModelLoadRequest(model_name="causal"), **options
            ),
        ],
        "look": [
            lambda: own.ListModels(pb.ListModelsRequest(), **options),
            lambda: other.ModelMetadata(oip.ModelMetadataRequest(name="causal"), **options),
        ],
    }
    for role, each in calls.items():
        expected = Code.OK if role in allowed else Code.PERMISSION_DENIED
        assert [code_of(call) for call in each] == [expected] * len(each), role


def test_whoever_infers_cannot_unload_a_model(channel: grpc.Channel, book: Book) -> None:
    stub = oip_grpc.GRPCInferenceServiceStub(channel)
    request = oip.RepositoryModelUnloadRequest(model_name="causal")
    with pytest.raises(grpc.RpcError) as refused:
        stub.RepositoryModelUnload(request, metadata=book.metadata("trainer"))
    assert refused.value.code() is Code.PERMISSION_DENIED
    assert refused.value.details() == (
        "RepositoryModelUnload: given a caller that may infer, sessions; allowed: one that may "
        "admin"
    )
    assert attend(channel, book.metadata("trainer")) is Code.OK


def test_probes_need_no_token(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    answer = health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    other = oip_grpc.GRPCInferenceServiceStub(channel)
    assert other.ServerReady(oip.ServerReadyRequest()).ready


def test_the_sdk_sends_a_token_and_says_why_it_was_refused(
    server: AttentionServer, book: Book
) -> None:
    query = np.ones((1, serving.HEADS, 4, serving.DIM), np.float32)
    address = f"127.0.0.1:{server.port}"
    with AttentionClient(address, metadata=dict(book.metadata("reader"))) as client:
        assert client.attend(query, query, query, model="causal").output.shape == query.shape
        with pytest.raises(PermissionDeniedError, match="allowed: one that may sessions"):
            client.session("causal", num_layers=1, max_tokens=16)
    with AttentionClient(address) as client, pytest.raises(UnauthenticatedError, match="Bearer"):
        client.list_models()


def test_refusals_come_before_a_byte_of_the_body(server: AttentionServer, book: Book) -> None:
    read_before = server.plane.gauges()["bytes_in_flight"]
    for more in ({}, {"authorization": "Bearer x"}):
        with http2.Http2Connection(server.port) as connection:
            connection.send(http2.headers(1, serving.ATTEND, more=more))
            assert connection.answer(1) == b""  # there was no body, and yet it is over
    # An answer to the test before may have been on its way.
    assert server.plane.gauges()["bytes_in_flight"] <= read_before


def test_a_caller_that_is_refused_may_send_little_more(server: AttentionServer) -> None:
    """Bodies of refused calls stop at the small window that follows the first refusal."""
    with http2.Http2Connection(server.port) as connection:
        connection.send(http2.headers(1, serving.ATTEND))
        windows = []
        for frame in connection.frames():
            if frame.kind == http2.SETTINGS and not frame.flags & http2.ACK:
                settings = (frame.payload[at : at + 6] for at in range(0, len(frame.payload), 6))
                windows += [
                    int.from_bytes(each[2:], "big")
                    for each in settings
                    if each[:2] == b"\0\4"  # SETTINGS_INITIAL_WINDOW_SIZE
                ]
            if len(windows) == 2:
                break
        assert windows[1] <= 1024 < windows[0]


def test_secrets_are_in_no_log_and_no_message(repository: Path, tmp_path: Path, book: Book) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    own = Book(tmp_path / "callers")
    own.add("one", "infer")
    said = []
    try:
        with (
            serving.serving(repository, callers=own.path) as server,
            grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            assert attend(channel, own.metadata("one")) is Code.OK
            wrong = f"Bearer {book.tokens['ops']}"
            with pytest.raises(grpc.RpcError) as refused:
                serving.raw_call(channel, serving.ATTEND)(b"", metadata=(("authorization", wrong),))
            said.append(refused.value.details())
            own.path.write_text(own.path.read_text() + f"two infer {own.tokens['one']}\n")
            assert serving.eventually(lambda: "files not taken" in written.getvalue())
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    said.append(written.getvalue())
    digests = re.findall(r"sha256:([0-9a-f]{64})", own.path.read_text())
    assert len(digests) == 1
    for secret in (own.tokens["one"], book.tokens["ops"], *digests):
        assert not any(secret in text for text in said)


# The file of callers


def test_the_file_is_read_again_when_it_changes(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = Book(tmp_path / "callers")
    book.add("first", "infer")
    with (
        serving.serving(repository, callers=book.path) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        whole = book.path.read_text()
        book.add("second", "infer")
        assert serving.eventually(lambda: attend(channel, book.metadata("second")) is Code.OK)
        assert attend(channel, book.metadata("first")) is Code.OK
        book.path.write_text("what is no line\n")
        assert serving.eventually(lambda: "files not taken, the former ones" in caplog.text)
        assert attend(channel, book.metadata("second")) is Code.OK  # they stay in use
        beside = tmp_path / "new"  # as Kubernetes replaces what it mounts
        beside.write_text(whole)
        os.replace(beside, book.path)
        assert serving.eventually(
            lambda: attend(channel, book.metadata("second")) is Code.UNAUTHENTICATED
        )
        assert attend(channel, book.metadata("first")) is Code.OK


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a infer", "line 1: given fewer than three words"),
        ("a infer secret-token", "line 1: credential: allowed: sha256: and 64 digits"),
        (f"a infer sha256:{'0' * 63}", "line 1: credential"),
        (f"@a infer sha256:{'0' * 64}", "line 1: name"),
        (f"a reader sha256:{'0' * 64}", "line 1: given 'reader'; allowed: infer, sessions, admin"),
        (f"a infer sha256:{'0' * 64} speed=1", "line 1: given 'speed'; allowed: requests-per-sec"),
        (f"a infer sha256:{'0' * 64} calls=x", "line 1: calls: given 'x'; allowed: an integer"),
        (f"# a\na infer sha256:{'0' * 64}\nb infer sha256:{'0' * 64}", "line 3: a credential that"),
    ],
)
def test_lines_that_are_none(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "callers"
    path.write_text(line)
    with pytest.raises(callers.CallersError, match=re.escape(said)) as refused:
        callers.read(path, BOUNDS)
    assert "secret" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_line_has_bounds_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "callers"
    path.write_text(f"a infer sha256:{'0' * 64} # for people\n\nb admin certificate:b.example\n")
    first, second = callers.read(path, BOUNDS)
    assert (first.kind, first.value) == ("sha256", bytes(32))
    assert (second.kind, second.value) == ("certificate", b"b.example")


def test_make_token_makes_a_token_and_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["make-token", "trainer", "--roles", "infer"]) == 0
    token, line = [text.split(maxsplit=1)[1] for text in capsys.readouterr().out.splitlines()]
    path = tmp_path / "callers"
    path.write_text(line)
    assert len(callers.read(path, BOUNDS)) == 1
    assert token.startswith("attn_")
    assert token not in line
    new = tmp_path / "new"
    for name in ("a", "b"):
        assert cli.main(["make-token", name, "--roles", "infer,admin", "--callers", str(new)]) == 0
    [first, second] = capsys.readouterr().out.split()
    assert first != second
    assert len(callers.read(new, BOUNDS)) == 2
    assert new.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SystemExit):
        cli.main(["make-token", "a b"])
    with pytest.raises(SystemExit):
        cli.main(["make-token", "a", "--roles", "root"])


# Credentials that are withdrawn


class _Open:
    """Streams that have been answered once and wait."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def attend(self, channel: grpc.Channel, metadata: tuple = ()) -> Any:
        def requests() -> Iterator[pb.AttendStreamRequest]:
            yield pb.AttendStreamRequest(request_id=1, request=serving.attend_request())
            self.over.wait(60)
            yield pb.AttendStreamRequest(request_id=2, request=serving.attend_request())

        stub = pb_grpc.AttentionServiceStub(channel)
        call = stub.AttendStream(requests(), metadata=metadata, timeout=60)
        assert next(call).request_id == 1
        return call

    def decode(self, channel: grpc.Channel, metadata: tuple = ()) -> Any:
        def requests() -> Iterator[pb.DecodeRequest]:
            new = pb.OpenSessions(
                model="causal", num_layers=1, sessions=[pb.NewSession(max_tokens=64)]
            )
            yield pb.DecodeRequest(request_id=1, open=new)
            self.over.wait(60)

        stub = pb_grpc.AttentionServiceStub(channel)
        call = stub.Decode(requests(), metadata=metadata, timeout=60)
        assert next(call).opened.sessions
        return call


def test_a_token_that_is_withdrawn_ends_what_it_has_open(repository: Path, tmp_path: Path) -> None:
    book, streams = Book(tmp_path / "callers"), _Open()
    for name, roles in (("gone", "infer,sessions"), ("less", "infer,sessions"), ("stays", "infer")):
        book.add(name, roles)
    with (
        serving.serving(repository, callers=book.path) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        gone = book.metadata("gone")
        ended = [streams.attend(channel, gone), streams.decode(channel, gone)]
        less = streams.decode(channel, book.metadata("less"))
        stays = streams.attend(channel, book.metadata("stays"))
        lines = [line for line in book.path.read_text().splitlines() if "gone" not in line]
        book.path.write_text("\n".join(lines).replace("less infer,sessions", "less infer"))
        began = time.monotonic()
        assert serving.eventually(lambda: all(call.done() for call in [*ended, less]), 20)
        assert time.monotonic() - began < 5
        assert [call.code() for call in ended] == [Code.UNAUTHENTICATED] * 2
        assert "withdrawn" in ended[0].details()
        assert less.code() is Code.PERMISSION_DENIED
        assert attend(channel, gone) is Code.UNAUTHENTICATED
        assert not stays.done()
        streams.over.set()
        assert next(stays).request_id == 2
        assert server.plane.gauges()["inside"] == 0


def test_a_certificate_that_is_trusted_no_more_ends_what_it_has_open(
    repository: Path, tmp_path: Path
) -> None:
    first = certificates.Authority(_folder(tmp_path / "first"))
    second = certificates.Authority(_folder(tmp_path / "second"))
    own, trusted, streams = first.issue("server"), tmp_path / "trusted.pem", _Open()
    trusted.write_bytes(first.certificate.read_bytes() + second.certificate.read_bytes())
    tls = {"tls_certificate": own.certificate, "tls_key": own.key}

    def channel(authority: certificates.Authority, name: str) -> grpc.Channel:
        shown = grpc.ssl_channel_credentials(
            first.certificate.read_bytes(), *authority.issue(name).pem()
        )
        return grpc.secure_channel(f"127.0.0.1:{server.port}", shown)

    with (
        serving.serving(repository, tls_client_authorities=trusted, **tls) as server,
        channel(first, "old") as old,
        channel(second, "new") as new,
    ):
        ended = [streams.attend(old), streams.decode(old)]
        stays = streams.attend(new)
        trusted.write_bytes(second.certificate.read_bytes())
        assert serving.eventually(lambda: all(call.done() for call in ended), 20)
        assert [call.code() for call in ended] == [Code.UNAUTHENTICATED] * 2
        assert "trusted" in ended[0].details()
        assert attend(old) in (Code.UNAVAILABLE, Code.UNAUTHENTICATED)
        assert not stays.done()
        assert attend(new) is Code.OK
        streams.over.set()
        assert next(stays).request_id == 2


# Identity and what is kept


def test_sessions_belong_to_the_caller_wherever_it_calls_from(
    server: AttentionServer, book: Book
) -> None:
    def ask(name: str, request: pb.DecodeRequest) -> pb.DecodeResponse:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = pb_grpc.AttentionServiceStub(channel)
            [answer] = stub.Decode(iter([request]), metadata=book.metadata(name), timeout=20)
            return answer

    new = pb.OpenSessions(model="causal", num_layers=1, sessions=[pb.NewSession(max_tokens=64)])
    opened = ask("trainer", pb.DecodeRequest(request_id=1, open=new)).opened
    [session] = opened.sessions
    renew = pb.DecodeRequest(request_id=1, renew=pb.RenewSession(session_id=session.session_id))
    assert ask("trainer", renew).session.session_id == session.session_id
    refused = ask("chat", renew).error
    assert refused.code == Code.NOT_FOUND.value[0]
    close = pb.DecodeRequest(request_id=1, close=pb.CloseSession(session_id=session.session_id))
    assert ask("chat", close).error.code == Code.NOT_FOUND.value[0]
    assert ask("trainer", close).WhichOneof("result") == "done"


def test_stored_tensors_belong_to_the_caller_that_stored_them(
    server: AttentionServer, book: Book
) -> None:
    address = f"127.0.0.1:{server.port}"
    elements = np.ones((1, serving.HEADS, 8, serving.DIM), np.float32)

    def client(name: str) -> AttentionClient:
        return AttentionClient(address, metadata=dict(book.metadata(name)))

    with client("trainer") as own, client("trainer") as again, client("reader") as foreign:
        kept = own.put_tensor(elements)
        calls: list[Callable[[AttentionClient], object]] = [
            lambda who: who.attend(elements, kept, kept, model="causal"),
            lambda who: who.renew_tensor(kept),
            lambda who: who.drop_tensor(kept),
        ]
        for call in calls:
            with pytest.raises(NotFoundError, match="no such tensor is kept"):
                call(foreign)
        with foreign.stream() as stream:
            late = stream.submit(elements, kept, kept, model="causal")
            with pytest.raises(NotFoundError, match="no such tensor is kept"):
                late.result(20)
        for call in calls:
            call(again)


# Certificates


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> certificates.Authority:
    return certificates.Authority(tmp_path_factory.mktemp("authority"))


def test_a_certificate_is_an_identity(
    repository: Path, authority: certificates.Authority, tmp_path: Path
) -> None:
    own = authority.issue("server")
    path = tmp_path / "callers"
    path.write_text("operations admin certificate:ops\n")
    options = {
        "tls_certificate": own.certificate,
        "tls_key": own.key,
        "tls_client_authorities": authority.certificate,
        "callers": path,
    }
    root = authority.certificate.read_bytes()
    unload = oip.RepositoryModelUnloadRequest(model_name="causal")
    with serving.serving(repository, **options) as server:
        for name, may_infer, may_unload in (("ops", False, True), ("anybody", True, False)):
            shown = grpc.ssl_channel_credentials(root, *authority.issue(name).pem())
            with grpc.secure_channel(f"127.0.0.1:{server.port}", shown) as channel:
                stub = oip_grpc.GRPCInferenceServiceStub(channel)
                denied = Code.PERMISSION_DENIED
                assert attend(channel) is (Code.OK if may_infer else denied)
                index = oip.RepositoryModelLoadRequest(model_name="causal")
                load = code_of(lambda: stub.RepositoryModelLoad(index))  # noqa: B023
                assert load is (Code.OK if may_unload else denied)
    options["certificate_roles"] = "none"
    with serving.serving(repository, **options) as server:
        shown = grpc.ssl_channel_credentials(root, *authority.issue("anybody").pem())
        with grpc.secure_channel(f"127.0.0.1:{server.port}", shown) as channel:
            assert attend(channel) is Code.UNAUTHENTICATED
            assert (
                code_of(
                    lambda: oip_grpc.GRPCInferenceServiceStub(channel).RepositoryModelUnload(unload)
                )
                is Code.UNAUTHENTICATED
            )


def test_certificates_are_replaced_without_a_lost_connection(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = certificates.Authority(_folder(tmp_path / "first"))
    second = certificates.Authority(_folder(tmp_path / "second"))
    chain, key = tmp_path / "server.pem", tmp_path / "server.key"

    def install(authority: certificates.Authority) -> None:
        made = authority.issue("server")
        chain.write_bytes(made.certificate.read_bytes())
        key.write_bytes(made.key.read_bytes())

    def trusting(authority: certificates.Authority) -> grpc.Channel:
        trusted = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.secure_channel(f"127.0.0.1:{server.port}", trusted, options)

    def served(authority: certificates.Authority) -> bool:
        with trusting(authority) as channel:
            return attend(channel) is Code.OK

    install(first)
    with serving.serving(repository, tls_certificate=chain, tls_key=key) as server:
        until = threading.Event()

        def late() -> Iterator[pb.AttendStreamRequest]:
            yield pb.AttendStreamRequest(request_id=1, request=serving.attend_request())
            until.wait(60)
            yield pb.AttendStreamRequest(request_id=2, request=serving.attend_request())

        with trusting(first) as old:
            stream = pb_grpc.AttentionServiceStub(old).AttendStream(late(), timeout=60)
            assert next(stream).request_id == 1
            install(second)
            assert serving.eventually(lambda: served(second), 20)
            assert not served(first)
            assert attend(old) is Code.OK  # over the connection that was there
            until.set()
            assert next(stream).request_id == 2
        chain.write_text("rubbish")
        assert serving.eventually(lambda: "files not taken, the former ones" in caplog.text)
        assert served(second)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


# Who may be reached


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True), ("127.8.9.1", True), ("localhost", True), ("::1", True),
        ("[::1]", True), ("::ffff:127.0.0.1", True), ("unix:/run/x", True),
        ("unix-abstract:x", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False),
        ("no-such-host.invalid", False),
    ],
)  # fmt: skip
def test_what_is_local(host: str, local: bool) -> None:
    assert exposure.is_local(host) is local


def test_others_reach_a_server_only_with_tls_and_identity_unless_that_is_meant(
    tmp_path: Path,
) -> None:
    tls = {"tls_certificate": Path("x"), "tls_key": Path("x")}
    identity = {"callers": Path("x")}
    mutual = {"tls_client_authorities": Path("x")}

    def missing(**given: Path) -> str:
        with pytest.raises(exposure.ExposureError) as refused:
            exposure.check(Settings(tmp_path, host="0.0.0.0", **given))
        return str(refused.value)

    assert "without TLS (--tls-certificate) and without callers' identity" in missing()
    assert "identity" in missing(**tls)
    assert "TLS (--tls-certificate);" in missing(**identity)
    exposure.check(Settings(tmp_path, host="0.0.0.0", **tls, **identity))
    exposure.check(Settings(tmp_path, host="0.0.0.0", **tls, **mutual))
    exposure.check(Settings(tmp_path, host="0.0.0.0", insecure=True))
    exposure.check(Settings(tmp_path))


def test_the_command_says_so_in_one_line(repository: Path) -> None:
    command = [sys.executable, "-m", "attnserve_server.cli", "--repository", str(repository)]
    command += ["--host", "0.0.0.0", "--port", "0", "--metrics-port", "-1", "--provider", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("attnserve-server: --host: given 0.0.0.0, where others can reach it")


# Bounds of one caller


@pytest.fixture(scope="module")
def bounded(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    book = Book(tmp_path_factory.mktemp("bounded") / "callers")
    book.add("slow", "infer", "requests-per-second=2")
    book.add("few", "infer,sessions", "calls=2", "sessions=3")
    book.add("small", "infer,sessions", "in-flight-mib=1", "stored-mib=1", "kv-mib=1")
    book.add("free", "infer,sessions")
    with serving.serving(repository, callers=book.path) as running:
        yield running, book


def test_requests_a_second(bounded: tuple[AttentionServer, Book]) -> None:
    server, book = bounded
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        codes = [attend(channel, book.metadata("slow")) for _ in range(4)]
        assert codes.count(Code.RESOURCE_EXHAUSTED) >= 1
        assert codes[0] is Code.OK
        assert attend(channel, book.metadata("free")) is Code.OK
        stub = pb_grpc.AttentionServiceStub(channel)
        metadata = book.metadata("slow")
        with pytest.raises(grpc.RpcError) as refused:
            [stub.Attend(serving.attend_request(), metadata=metadata) for _ in range(4)]
        assert "--caller-requests-per-second" in refused.value.details()
        retry_after = float(dict(refused.value.trailing_metadata())["retry-after"])
        assert 0 < retry_after <= 0.5
        time.sleep(retry_after + 0.05)
        assert attend(channel, metadata) is Code.OK


def test_requests_on_a_stream_count_too(bounded: tuple[AttentionServer, Book]) -> None:
    server, book = bounded
    requests = [
        pb.AttendStreamRequest(request_id=number, request=serving.attend_request())
        for number in range(1, 8)
    ]
    time.sleep(1.1)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        answers = list(stub.AttendStream(iter(requests), metadata=book.metadata("slow")))
    refused = [answer for answer in answers if answer.WhichOneof("body") == "error"]
    assert len(answers) == 7
    assert len(refused) >= 5
    assert {answer.error.code for answer in refused} == {Code.RESOURCE_EXHAUSTED.value[0]}


def test_calls_at_once(bounded: tuple[AttentionServer, Book]) -> None:
    server, book = bounded
    until = threading.Event()

    def waiting() -> Iterator[pb.AttendStreamRequest]:
        yield pb.AttendStreamRequest(request_id=1, request=serving.attend_request())
        until.wait(30)

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        metadata = book.metadata("few")
        open_calls = [stub.AttendStream(waiting(), metadata=metadata) for _ in range(2)]
        for call in open_calls:
            assert next(call).request_id == 1
        assert attend(channel, metadata) is Code.RESOURCE_EXHAUSTED
        with grpc.insecure_channel(
            f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]
        ) as other:
            assert attend(other, metadata) is Code.RESOURCE_EXHAUSTED  # of all connections
        assert attend(channel, book.metadata("free")) is Code.OK
        until.set()
        for call in open_calls:
            list(call)
        assert serving.eventually(lambda: attend(channel, metadata) is Code.OK)


def test_bytes_in_flight_and_stored(bounded: tuple[AttentionServer, Book]) -> None:
    server, book = bounded
    address = f"127.0.0.1:{server.port}"
    large = serving.attend_request(length=4096)  # 1.5 MiB of tensors
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Attend(large, metadata=book.metadata("small"))
        assert refused.value.code() is Code.RESOURCE_EXHAUSTED
        assert "--caller-in-flight-mib" in refused.value.details()
        assert attend(channel, book.metadata("small")) is Code.OK
        stub.Attend(large, metadata=book.metadata("free"))
    tensor = np.zeros((3, 1 << 16), np.float32)  # 768 KiB
    with AttentionClient(address, metadata=dict(book.metadata("small"))) as client:
        kept = client.put_tensor(tensor)
        with pytest.raises(ResourceExhaustedError, match="--caller-stored-mib"):
            client.put_tensor(tensor, timeout=2)
        client.drop_tensor(kept)
        client.drop_tensor(client.put_tensor(tensor))
    assert serving.eventually(lambda: server.plane.gauges()["bytes_in_flight"] == 0)
    assert server.plane.gauges()["stored_bytes"] == 0


def test_sessions_at_once(bounded: tuple[AttentionServer, Book]) -> None:
    server, book = bounded
    address = f"127.0.0.1:{server.port}"
    with AttentionClient(address, metadata=dict(book.metadata("few"))) as client:
        opened = client.sessions(3, "causal", num_layers=1, max_tokens=16)
        with pytest.raises(ResourceExhaustedError, match="--caller-sessions"):
            client.session("causal", num_layers=1, max_tokens=16, timeout=2)
        with (
            AttentionClient(address, metadata=dict(book.metadata("free"))) as other,
            other.session("causal", num_layers=1, max_tokens=16),
        ):
            pass
        for session in opened:
            session.close()
        client.session("causal", num_layers=1, max_tokens=16).close()


def test_bytes_of_sessions(bounded: tuple[AttentionServer, Book]) -> None:
    server, book = bounded
    address = f"127.0.0.1:{server.port}"
    most = (1 << 20) // (serving.HEADS * serving.DIM * 4 * 2)  # tokens
    row = np.ones((1, serving.HEADS, serving.DIM), np.float32)
    with (
        AttentionClient(address, metadata=dict(book.metadata("small"))) as client,
        AttentionClient(address, metadata=dict(book.metadata("free"))) as other,
    ):
        with pytest.raises(ResourceExhaustedError, match=r"1048576 \(--caller-kv-mib\)") as never:
            client.session("causal", num_layers=1, max_tokens=most + 1)
        assert never.value.retry_after is None
        half = client.session("causal", num_layers=1, max_tokens=most // 2)
        # Not reserved, it is claimed step by step.
        growing = client.session(
            "causal", num_layers=1, max_tokens=most, reserved_tokens=most // 2 - 16
        )
        rows = np.repeat(row, most // 2 - 16, 0)
        growing.attend(0, rows, rows, rows)
        few = np.repeat(row, 16, 0)
        growing.attend(0, few, few, few)
        with pytest.raises(
            ResourceExhaustedError, match=r"sessions: .* \(--caller-kv-mib\)"
        ) as full:
            growing.attend(0, row, row, row, timeout=1)
        assert full.value.retry_after is not None
        with other.session("causal", num_layers=1, max_tokens=2 * most):
            pass
        half.close()
        growing.attend(0, row, row, row)
        growing.close()
        client.session("causal", num_layers=1, max_tokens=most, lease=0.2)
        with pytest.raises(ResourceExhaustedError):
            client.session("causal", num_layers=1, max_tokens=most, timeout=0.05)
        # Back when the lease has run out.
        time.sleep(0.25)
        client.session("causal", num_layers=1, max_tokens=most).close()
