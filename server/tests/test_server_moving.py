"""A server that ends hands its sessions to another: what its callers see on their bare streams."""

import contextlib
import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server import callers
from attnserve_server.app import AttentionServer
from attnserve_server.moving import MovingError
from attnserve_server.settings import KIB, Limits
from certificates import Authority
from decode_streams import (
    DIM,
    HEADS,
    KV_HEADS,
    PAGE,
    VALUE_DIM,
    Refused,
    Stream,
    check,
    layer_of,
    opening_of,
    plain,
    result_of,
    rows,
    step_of,
)
from handmade import attention, write_core
from prometheus_client import generate_latest
from serving import draining, serving

pytestmark = pytest.mark.needs_library
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    causal = attention(HEADS, DIM, num_kv_heads=KV_HEADS, value_head_dim=VALUE_DIM, mask="causal")
    write_core(folder, "causal", causal)
    return folder


@pytest.fixture(scope="module")
def taker(models: Path) -> Iterator[AttentionServer]:
    with serving(models) as running:
        yield running


class Slow(pb_grpc.AttentionServiceServicer):
    """Takes any session, once it is told to."""

    def __init__(self) -> None:
        self.asked, self.told = threading.Event(), threading.Event()

    def MoveSession(  # noqa: N802
        self, requests: Iterator[pb.MoveSessionRequest], context: grpc.ServicerContext
    ) -> pb.SessionState:
        taken = list(requests)
        self.asked.set()
        assert self.told.wait(20)
        assert [each.chunk.last for each in taken] == [False] * (len(taken) - 1) + [True]
        return pb.SessionState(session_id="elsewhere")


@contextlib.contextmanager
def another(servicer: pb_grpc.AttentionServiceServicer) -> Iterator[str]:
    """A server of grpc's own; its address."""
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_AttentionServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def away() -> str:
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


def metric(server: AttentionServer, name: str) -> float:
    lines = generate_latest(server.metrics.registry).decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def moved_of(answer: pb.DecodeResponse) -> pb.MovedSession:
    """What an answer says of a session that has moved."""
    if answer.WhichOneof("result") == "moved":
        assert answer.request_id == 0
        return answer.moved
    assert answer.error.code == Code.UNAVAILABLE.value[0]
    assert answer.error.HasField("moved")
    assert answer.error.moved.address in answer.error.message
    return answer.error.moved


def ended(stream: Stream) -> grpc.StatusCode:
    """How a stream ended, of which nothing is due any more."""
    with pytest.raises(grpc.RpcError) as error:
        stream.receive()
    code: grpc.StatusCode = error.value.code()
    return code


def close(stream: Stream, *ids: str) -> None:
    for name in ids:
        stream.ask(close=pb.CloseSession(session_id=name))


def test_idle_sessions_move_and_their_stream_is_told(models: Path, taker: AttentionServer) -> None:
    with (
        serving(models, move_sessions_to=taker.address) as server,
        Stream(server.address) as stream,
    ):
        ids = stream.open(20)
        plains = [plain() for _ in ids]
        stream.step(1, ids, plains)
        with draining(server):
            told = {moved.session_id: moved for moved in (moved_of(stream.receive()) for _ in ids)}
            assert ended(stream) is Code.UNAVAILABLE
        assert metric(server, "attnserve_kv_sessions_moved_total") == len(ids)
    for name, expected in zip(ids, plains, strict=True):
        assert told[name].address == taker.address
        assert told[name].length == expected.length
        assert told[name].authority == ""
    with Stream(taker.address) as there:
        new = [told[name].new_session_id for name in ids]
        there.step(1, new, plains)
        there.step(2, new, plains)
        assert there.ask(renew=pb.RenewSession(session_id=new[0])).max_tokens == 256
        close(there, *new)


def test_a_step_that_has_begun_ends_where_it_began(models: Path, taker: AttentionServer) -> None:
    with (
        serving(models, move_sessions_to=taker.address, drain_seconds=20) as server,
        Stream(server.address) as stream,
        Stream(server.address) as other,
    ):
        name, tree = stream.open(2)
        expected = plain()
        stream.step(1, [name], [expected])
        stream.begin(2, [name], [3])
        grown = step_of(3, [tree], [2])
        grown.sessions[0].parents.extend([-1, -1])
        stream.ask(begin_step=grown)
        expected.begin(3)
        with draining(server):
            for layer in range(2):
                arrays = rows(3)
                attended = stream.ask(attend_layer=layer_of(2, layer, arrays))
                check(attended, [expected], [3], layer, arrays)
            expected.end()
            moved = moved_of(stream.receive())
            # Whoever asks by another stream is told, too.
            other.send(renew=pb.RenewSession(session_id=name))
            assert moved_of(other.receive()) == moved
            other.send(renew=pb.RenewSession(session_id="x" * 22))
            with pytest.raises(Refused, match="NOT_FOUND"):
                result_of(other.receive())
            # A tree is committed here.
            for layer in range(2):
                stream.ask(attend_layer=layer_of(3, layer, rows(2)))
            stream.ask(commit=pb.CommitTree(session_id=tree, accepted=[1]))
            assert moved_of(stream.receive()).length == 1
        assert moved.length == expected.length
    with Stream(taker.address) as there:
        there.step(1, [moved.new_session_id], [expected])


def test_what_is_asked_of_a_session_on_its_way_is_answered_once_it_has_moved(models: Path) -> None:
    slow = Slow()
    with (
        another(slow) as address,
        serving(models, move_sessions_to=address, drain_seconds=20) as server,
        Stream(server.address) as stream,
        Stream(server.address) as other,
    ):
        (name,) = stream.open()
        with draining(server):
            assert slow.asked.wait(20)
            query, key, value = rows(1)
            layer = layer_of(1, 0, (query, key, value), begin=step_of(1, [name], [1]))
            first = pb.AttendLayer(step_id=1, query=layer.query, begin=layer.begin)
            second = pb.AttendLayer(step_id=1, key=layer.key, value=layer.value)
            parts = stream.send(attend_layer=first)
            stream.send(parts, attend_layer=second)
            ids = [
                parts,
                stream.send(begin_step=step_of(2, [name], [1])),
                stream.send(close=pb.CloseSession(session_id=name)),
            ]
            # Nothing new is taken meanwhile, by whichever stream.
            for taken in (other, Stream(server.address)):
                with pytest.raises(Refused, match="UNAVAILABLE: the server is shutting down"):
                    taken.open()
            slow.told.set()
            answers = [stream.receive() for _ in range(4)]
            assert ended(stream) is Code.UNAVAILABLE
        assert {moved_of(answer).new_session_id for answer in answers} == {"elsewhere"}
        assert sorted(answer.request_id for answer in answers) == [0, *ids]


@pytest.mark.parametrize("reason", ["full", "away", "unknown name", "unfit", "refused"])
def test_what_nobody_takes_stays_and_its_callers_get_what_they_got_before(
    models: Path, tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"drain_seconds": 0.4}
    with contextlib.ExitStack() as stack:
        if reason == "away":
            address = away()
        elif reason == "unknown name":
            address, reason = "dns:///nowhere.invalid:8001", "away"
        elif reason == "unfit":  # of an older version
            address = stack.enter_context(another(pb_grpc.AttentionServiceServicer()))
        elif reason == "refused":  # it wants to know who calls
            tmp_path.joinpath("callers").write_text(f"a infer {callers.make_token()[1]}\n")
            taking = stack.enter_context(serving(models, callers=tmp_path / "callers"))
            address = taking.address
        else:
            limits = Limits(max_kv_bytes=64 * KIB)
            address = stack.enter_context(serving(models, limits=limits)).address
        server = stack.enter_context(serving(models, move_sessions_to=address, **options))
        stream = stack.enter_context(Stream(server.address))
        (name,) = stream.open(max_tokens=4096)
        stream.step(1, [name], [plain()])
        with draining(server):
            assert ended(stream) is Code.UNAVAILABLE
        name_of_metric = f'attnserve_kv_sessions_not_moved_total{{reason="{reason}"}}'
        assert metric(server, name_of_metric) == 1
        record = next(each for each in caplog.records if each.message == "session not moved")
        assert record.__dict__["reason"] == reason
        assert name not in str(record.__dict__)


def test_another_server_takes_what_one_does_not(models: Path, taker: AttentionServer) -> None:
    with (
        another(pb_grpc.AttentionServiceServicer()) as old,
        serving(models, move_sessions_to=f"{old},{taker.address},{away()}") as server,
        Stream(server.address) as stream,
    ):
        ids = stream.open(5)
        with draining(server):
            told = [moved_of(stream.receive()) for _ in ids]
        assert {moved.address for moved in told} == {taker.address}


def test_callers_of_a_unix_socket_are_known_at_unix_sockets_alone(
    models: Path, taker: AttentionServer, tmp_path: Path
) -> None:
    sockets = [f"unix:{tmp_path}/{name}" for name in "ab"]
    with (
        serving(models, host=sockets[0]) as last,
        serving(models, host=sockets[1], move_sessions_to=f"{taker.address},{sockets[0]}") as one,
        serving(models, move_sessions_to=sockets[0]) as other,
        Stream(sockets[1]) as of_socket,
        Stream(other.address) as of_loopback,
    ):
        (name,), _ = of_socket.open(), of_loopback.open()
        expected = plain()
        of_socket.step(1, [name], [expected])
        with draining(one):
            moved = moved_of(of_socket.receive())
        with Stream(moved.address) as there:
            there.step(1, [moved.new_session_id], [expected])
        with draining(other):
            assert ended(of_loopback) is Code.UNAVAILABLE
        assert metric(other, 'attnserve_kv_sessions_not_moved_total{reason="unfit"}') == 1
        assert len(last.plane.session_ids()) == 1


def test_a_step_that_does_not_end_in_time_is_lost_with_the_server(
    models: Path, taker: AttentionServer
) -> None:
    with (
        serving(models, move_sessions_to=taker.address, drain_seconds=0.3) as server,
        Stream(server.address) as stream,
    ):
        (name,) = stream.open()
        stream.begin(1, [name], [1])
        with draining(server):
            assert ended(stream) is Code.UNAVAILABLE
        assert metric(server, 'attnserve_kv_sessions_not_moved_total{reason="late"}') == 1


def test_steps_that_do_not_end_keep_no_other_session_here(
    models: Path, taker: AttentionServer
) -> None:
    with (
        serving(models, move_sessions_to=taker.address, drain_seconds=8) as server,
        Stream(server.address) as stream,
    ):
        ids = [name for _ in range(8) for name in stream.open(16)]
        held = ids[:80]
        for number, name in enumerate(held, 1):
            stream.begin(number, [name], [1])
        with draining(server):
            moved = {moved_of(stream.receive()).session_id for _ in ids[len(held) :]}
            assert moved == set(ids[len(held) :])
            for number, _ in enumerate(held, 1):
                stream.send(abandon_step=pb.AbandonStep(step_id=number))
            answers = [stream.receive() for _ in range(2 * len(held))]
        told = {answer.moved.session_id for answer in answers if answer.HasField("moved")}
        assert told == set(held)


def test_prefix_hashes_go_on_after_a_move(models: Path, taker: AttentionServer) -> None:
    hashes = [hashlib.sha256(bytes([page])).digest() for page in range(3)]

    def fill(stream: Stream, name: str, step_id: int, pages: range) -> None:
        step = step_of(step_id, [name], [PAGE * len(pages)])
        step.sessions[0].prefix_hashes = b"".join(hashes[page] for page in pages)
        stream.ask(begin_step=step)
        for layer in range(2):
            stream.ask(attend_layer=layer_of(step_id, layer, rows(PAGE * len(pages))))

    with (
        serving(models, move_sessions_to=taker.address) as server,
        Stream(server.address) as stream,
    ):
        (name,) = stream.open()
        fill(stream, name, 1, range(2))
        with draining(server):
            moved = moved_of(stream.receive())
    with Stream(taker.address) as there:
        fill(there, moved.new_session_id, 1, range(2, 3))
        fork = there.ask(fork=pb.ForkSession(session_id=moved.new_session_id))
        assert fork.length == 3 * PAGE
        close(there, fork.session_id, moved.new_session_id)


def test_a_session_keeps_its_caller_where_callers_are_identified(
    models: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    server_files = authority.issue("server")
    tokens = {}
    with tmp_path.joinpath("callers").open("w") as book:
        for name, rest in (("mover", "move {}"), ("chat", "sessions {} sessions=2"),
                           ("other", "sessions {}")):  # fmt: skip
            tokens[name], digest = callers.make_token()
            book.write(f"{name} {rest.format(digest)}\n")
    token_file = tmp_path / "token"
    token_file.write_text(tokens["mover"])
    tls = {
        "tls_certificate": server_files.certificate,
        "tls_key": server_files.key,
        "callers": tmp_path / "callers",
    }
    moving = {"move_ca": authority.certificate, "move_token_file": token_file}

    def stream_of(address: str, name: str) -> Stream:
        return Stream(address, authority.certificate.read_bytes(), tokens[name])

    with (
        serving(models, **tls) as there,
        serving(
            models, **tls, **moving, move_sessions_to=f"dns:///localhost:{there.port}"
        ) as server,
        stream_of(server.address, "chat") as stream,
    ):
        (name,) = stream.open()
        expected = plain()
        stream.step(1, [name], [expected])
        with draining(server):
            moved = moved_of(stream.receive())
        assert moved.address == there.address
        assert moved.authority == f"localhost:{there.port}"
        with (
            stream_of(there.address, "other") as stranger,
            pytest.raises(Refused, match="NOT_FOUND"),
        ):
            stranger.ask(renew=pb.RenewSession(session_id=moved.new_session_id))
        with stream_of(there.address, "mover") as mover:
            assert ended(mover) is Code.PERMISSION_DENIED
        with stream_of(there.address, "chat") as own:
            own.step(1, [moved.new_session_id], [expected])
            own.open()
            with pytest.raises(Refused, match="--caller-sessions"):
                own.open()


@pytest.mark.parametrize("said_by", ["line", "roles of all", "nobody"])
def test_sessions_move_by_mutual_tls(
    models: Path, tmp_path: Path, said_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path)
    server_files, mover, chat = (authority.issue(name) for name in ("server", "mover", "chat"))
    mutual: dict[str, Any] = {
        "tls_certificate": server_files.certificate,
        "tls_key": server_files.key,
        "tls_client_authorities": authority.certificate,
    }
    if said_by == "line":
        mutual["callers"] = tmp_path / "callers"
        mutual["callers"].write_text("mover move certificate:mover\n")
    elif said_by == "roles of all":
        mutual["certificate_roles"] = "sessions,move"
    moving = {
        "move_ca": authority.certificate,
        "move_certificate": mover.certificate,
        "move_key": mover.key,
    }

    def stream_of(address: str) -> Stream:
        return Stream(address, authority.certificate.read_bytes(), identity=chat.pem())

    with (
        serving(models, **mutual) as there,
        serving(models, **mutual, **moving, move_sessions_to=there.address) as server,
        stream_of(server.address) as stream,
    ):
        (name,) = stream.open()
        expected = plain()
        stream.step(1, [name], [expected])
        with draining(server):
            if said_by == "nobody":
                assert ended(stream) is Code.UNAVAILABLE
            else:
                moved = moved_of(stream.receive())
        if said_by == "nobody":
            record = next(each for each in caplog.records if each.message == "session not moved")
            assert record.__dict__["reason"] == "refused"
            assert "may infer, sessions; allowed: one that may move" in record.__dict__["said"]
            return
        with stream_of(there.address) as own:
            own.step(1, [moved.new_session_id], [expected])


def export_of(models: Path) -> list[pb.SessionChunk]:
    with serving(models) as server, Stream(server.address) as stream:
        (name,) = stream.open()
        stream.step(1, [name], [plain()])
        stream.send(export_session=pb.ExportSession(session_id=name))
        chunks = []
        while not chunks or not chunks[-1].last:
            chunks.append(stream.receive().chunk)
        return chunks


def test_what_is_no_session_is_refused(models: Path, taker: AttentionServer) -> None:
    chunks = export_of(models)
    whose = pb.MovingSession(caller="you")

    def requests(*, session: pb.MovingSession | None = whose) -> list[pb.MoveSessionRequest]:
        made = [pb.MoveSessionRequest(chunk=chunk) for chunk in chunks]
        if session is not None:
            made[0].session.CopyFrom(session)
        return made

    def changed(change: Callable[[list[pb.MoveSessionRequest]], Any]) -> Any:
        made = requests()
        change(made)
        return made

    def damage(made: list[pb.MoveSessionRequest]) -> None:
        made[0].chunk.data = made[0].chunk.data[:-1] + b"!"

    hashes = pb.MovingSession(caller="you", prefix_hashes=bytes(32 * 99))
    cases = [
        ([], Code.INVALID_ARGUMENT, "stream: given its end"),
        (requests(session=None), Code.INVALID_ARGUMENT, "session: given nothing"),
        (requests(session=pb.MovingSession()), Code.INVALID_ARGUMENT, "session.caller: given 0"),
        (
            requests(session=pb.MovingSession(caller="x" * 513)),
            Code.INVALID_ARGUMENT,
            "session.caller: given 513",
        ),
        (requests(session=hashes), Code.INVALID_ARGUMENT, "session.prefix_hashes: given 99"),
        (
            requests(session=pb.MovingSession(caller="you", prefix_hashes=b"x")),
            Code.INVALID_ARGUMENT,
            "session.prefix_hashes: given 1 bytes",
        ),
        (requests()[:-1], Code.INVALID_ARGUMENT, "stream: given its end"),
        (requests()[1:], Code.INVALID_ARGUMENT, "session: given nothing"),
        ([pb.MoveSessionRequest(session=whose)], Code.INVALID_ARGUMENT, "chunk.data"),
        (changed(lambda made: made[1].session.CopyFrom(whose)), Code.INVALID_ARGUMENT, "session:"),
        (changed(damage), Code.DATA_LOSS, "chunk"),
    ]
    with grpc.insecure_channel(taker.address) as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        for given, code, said in cases:
            with pytest.raises(grpc.RpcError) as refused:
                stub.MoveSession(iter(given), timeout=20)
            assert (refused.value.code(), said in refused.value.details()) == (code, True), said
        state = stub.MoveSession(iter(requests()), timeout=20)
        assert state.session_id
        assert state.length > 0


def test_settings_that_cannot_be_are_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    for options, said in (
        ({"move_ca": tmp_path / "none"}, "--move-ca: given"),
        ({"move_key": tmp_path / "token"}, "--move-key: given without --move-certificate"),
        ({"move_token_file": tmp_path / "token"}, "--move-token-file: given without --move-ca"),
        ({"move_token_file": tmp_path / "none"}, "--move-token-file: given"),
    ):
        with (
            pytest.raises(MovingError, match=said),
            serving(models, move_sessions_to="b.example:8001", **options),
        ):
            pass


def test_an_opening_is_not_lost_between_the_look_and_the_end(
    models: Path, taker: AttentionServer
) -> None:
    """Sessions that are opened while a drain begins are moved, or were refused."""
    with (
        serving(models, move_sessions_to=taker.address) as server,
        Stream(server.address) as stream,
    ):
        sent = [stream.send(open=opening_of(1)) for _ in range(20)]
        opened, moved = set(), set()
        with draining(server), contextlib.suppress(grpc.RpcError):
            while True:  # until the stream's end
                answer = stream.receive()
                if answer.WhichOneof("result") == "moved":
                    moved.add(answer.moved.session_id)
                elif answer.WhichOneof("result") == "opened":
                    opened |= {session.session_id for session in answer.opened.sessions}
        assert moved == opened
        assert len(opened) <= len(sent)
