"""Decode over its bare messages, against a plain cache in float64.

What the SDK can't do or hides: requests sent ahead of answers, streams that break in the middle of
a step, callers that are computed together, and every kind of bad input.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import grpc
import pytest
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from attnserve_server.settings import MIB, Limits
from decode_streams import (
    DIM,
    HEADS,
    KV_HEADS,
    VALUE_DIM,
    Array,
    Refused,
    Stream,
    check,
    generator,
    layer_of,
    opening_of,
    plain,
    result_of,
    rows,
    step_of,
    tensor,
)
from handmade import attention, write_core
from serving import serving

pytestmark = pytest.mark.needs_library


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    causal = attention(HEADS, DIM, num_kv_heads=KV_HEADS, value_head_dim=VALUE_DIM, mask="causal")
    write_core(folder, "causal", causal)
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[AttentionServer]:
    with serving(models) as running:
        yield running


@pytest.fixture
def stream(server: AttentionServer) -> Iterator[Stream]:
    with Stream(server.address) as opened:
        yield opened


def test_prefill_and_decoding_are_mixed_in_one_step(stream: Stream) -> None:
    ids = stream.open(5)
    plains = [plain() for _ in ids]
    for step_id in range(1, 8):
        some = sorted(generator.permutation(5)[: step_id % 5 + 1])
        stream.step(step_id, [ids[i] for i in some], [plains[i] for i in some])


def test_answers_say_where_the_time_went_and_when_the_step_ends(stream: Stream) -> None:
    ids = stream.open(3)
    stream.begin(1, ids, [2, 1, 4])
    for layer, last in ((1, False), (0, True)):
        attended = stream.ask(attend_layer=layer_of(1, layer, rows(7)))
        assert attended.timings.batch_size == 3
        assert attended.step_ended == last


def test_only_what_is_asked_for_is_returned(stream: Stream) -> None:
    ids = stream.open()
    stream.begin(1, ids, [5])
    attended = stream.ask(
        attend_layer=layer_of(
            1, 0, rows(5), returns=pb.LayerReturns(no_output=True, log_sum_exp=True)
        )
    )
    assert list(attended.log_sum_exp.shape) == [5, HEADS]
    assert not attended.HasField("output")
    assert not attended.HasField("entropy")


def test_requests_may_be_sent_ahead_of_answers(stream: Stream) -> None:
    ids = stream.open()
    expected = plain()
    sent = []
    for step_id, tokens in ((1, 30), (2, 1), (3, 1)):
        sent.append((stream.send(begin_step=step_of(step_id, ids, [tokens])), tokens, None, None))
        for layer in range(2):
            arrays = rows(tokens)
            request = layer_of(step_id, layer, arrays)
            sent.append((stream.send(attend_layer=request), tokens, layer, arrays))
    stream.send(truncate=pb.TruncateSession(session_id=ids[0], length=10))
    stream.send(close=pb.CloseSession(session_id=ids[0]))
    stream.end()
    for request_id, tokens, layer, arrays in sent:
        answer = stream.receive()
        assert answer.request_id == request_id
        if layer is None or arrays is None:
            assert list(result_of(answer).lengths) == [expected.length]
            expected.begin(tokens)
            continue
        check(result_of(answer), [expected], [tokens], layer, arrays)
        if layer == 1:
            expected.end()
    assert result_of(stream.receive()).length == 10
    assert stream.receive().WhichOneof("result") == "done"
    assert stream.call.code() == grpc.StatusCode.OK


def test_steps_of_other_sessions_overlap(stream: Stream) -> None:
    ids = stream.open(2)
    plains = [plain(), plain()]
    arrays = {}
    for layer in range(2):
        for one in range(2):
            if layer == 0:
                assert stream.begin(one + 1, [ids[one]], [3]) == [0]
                plains[one].begin(3)
        for one in range(2):
            arrays[one] = rows(3)
            stream.send(attend_layer=layer_of(one + 1, layer, arrays[one]))
        answers = sorted((stream.receive() for _ in range(2)), key=lambda each: each.request_id)
        for one, answer in enumerate(answers):
            check(result_of(answer), [plains[one]], [3], layer, arrays[one])


def test_callers_are_computed_together(models: Path) -> None:
    with (
        serving(models, batch_delay=0.5) as server,
        Stream(server.address) as one,
        Stream(server.address) as other,
    ):
        streams = (one, other)
        ids = [one.open(2), other.open(1, max_tokens=999)]
        plains = [[plain(), plain()], [plain()]]
        lengths = [[40, 1], [7]]
        for _ in range(2):
            for at, stream in enumerate(streams):
                stream.begin(1, ids[at], lengths[at])
                for each, length in zip(plains[at], lengths[at], strict=True):
                    each.begin(length)
            for layer in range(2):
                arrays = [rows(sum(each)) for each in lengths]
                for at, stream in enumerate(streams):
                    stream.send(attend_layer=layer_of(1, layer, arrays[at]))
                for at, stream in enumerate(streams):
                    attended = result_of(stream.receive())
                    if lengths[0] == [1, 2]:
                        assert attended.timings.batch_size == 3
                    check(attended, plains[at], lengths[at], layer, arrays[at])
            for each in (*plains[0], *plains[1]):
                each.end()
            lengths = [[1, 2], [3]]


def test_a_tree_is_computed_together_with_others(models: Path) -> None:
    with (
        serving(models, batch_delay=0.5) as server,
        Stream(server.address) as one,
        Stream(server.address) as other,
    ):
        trees = one.open(1, num_layers=1)
        chains = other.open(1, num_layers=1)
        plains = [plain(1), plain(1)]
        for stream, ids, each in ((one, trees, plains[0]), (other, chains, plains[1])):
            stream.step(1, ids, [each])
        parents = [-1, 0, 0, 1]
        step = pb.SessionStep(session_id=trees[0], new_tokens=4, parents=parents)
        one.ask(begin_step=pb.BeginStep(step_id=2, sessions=[step]))
        other.begin(2, chains, [3])
        plains[0].begin(4, parents)
        plains[1].begin(3)
        arrays = [rows(4), rows(3)]
        for stream, each in ((one, arrays[0]), (other, arrays[1])):
            stream.send(attend_layer=layer_of(2, 0, each))
        for at, (stream, tokens) in enumerate(((one, 4), (other, 3))):
            attended = result_of(stream.receive())
            assert attended.timings.batch_size == 2
            check(attended, [plains[at]], [tokens], 0, arrays[at])


def begun_layer(
    step_id: int, ids: Sequence[str], lengths: Sequence[int], layer: int, arrays: Sequence[Array]
) -> pb.AttendLayer:
    return layer_of(step_id, layer, arrays, begin=step_of(0, ids, lengths))


def test_a_layer_begins_its_step(stream: Stream) -> None:
    ids = stream.open(2)
    plains = [plain(), plain()]
    for lengths in ([3, 20], [1, 1]):
        before = [each.length for each in plains]
        for each, length in zip(plains, lengths, strict=True):
            each.begin(length)
        arrays = rows(sum(lengths))
        attended = stream.ask(attend_layer=begun_layer(1, ids, lengths, 1, arrays))
        assert list(attended.lengths) == before
        check(attended, plains, lengths, 1, arrays)
        attended = stream.ask(attend_layer=layer_of(1, 0, arrays))
        assert not attended.lengths
        assert attended.step_ended
        check(attended, plains, lengths, 0, arrays)
        for each in plains:
            each.end()


def test_a_step_is_begun_by_the_first_part_of_a_layer(stream: Stream) -> None:
    ids = stream.open()
    expected = plain()
    query, key, value = rows(3)
    request_id = stream.send(attend_layer=begun_layer(1, ids, [3], 0, (query,)))
    expected.begin(3)
    other = rows(3)
    check(stream.ask(attend_layer=layer_of(1, 1, other)), [expected], [3], 1, other)
    rest = pb.AttendLayer(step_id=1, key=tensor(key), value=tensor(value))
    stream.send(request_id, attend_layer=rest)
    attended = result_of(stream.receive())
    assert list(attended.lengths) == [0]
    assert attended.step_ended
    check(attended, [expected], [3], 0, (query, key, value))


def test_steps_that_layers_begin_are_sent_ahead_of_answers(stream: Stream) -> None:
    ids = stream.open(num_layers=1)
    expected = plain(1)
    sent = [(tokens, rows(tokens)) for tokens in (30, 1, 1, 5)]
    for tokens, arrays in sent:
        stream.send(attend_layer=begun_layer(1, ids, [tokens], 0, arrays))
    for tokens, arrays in sent:
        attended = result_of(stream.receive())
        assert list(attended.lengths) == [expected.length]
        expected.begin(tokens)
        check(attended, [expected], [tokens], 0, arrays)
        expected.end()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_step(stream: Stream, session_id: str) -> bool:
    try:
        fork = stream.ask(fork=pb.ForkSession(session_id=session_id))
    except Refused as refused:
        return "in a step" in str(refused)
    stream.ask(close=pb.CloseSession(session_id=fork.session_id))
    return False


def test_a_stream_that_breaks_gives_its_step_up_and_not_its_sessions(
    server: AttentionServer,
) -> None:
    expected = plain()
    with Stream(server.address) as first:
        ids = first.open()
        first.step(1, ids, [expected])
        first.begin(2, ids, [40])
        first.ask(attend_layer=layer_of(2, 1, rows(40)))
        first.send(attend_layer=layer_of(2, 0, rows(40)[:1]))
        first.call.cancel()
    with Stream(server.address) as second:
        wait_until(lambda: not in_step(second, ids[0]))  # the server has noticed
        second.step(1, ids, [expected])
        assert second.ask(renew=pb.RenewSession(session_id=ids[0])).length == expected.length
        second.ask(close=pb.CloseSession(session_id=ids[0]))


def test_a_stream_that_breaks_while_a_layer_runs_gives_its_step_up(models: Path) -> None:
    expected = plain(1)
    with serving(models, batch_delay=0.3) as server, Stream(server.address) as second:
        ids = second.open(num_layers=1)
        second.step(1, ids, [expected])
        with Stream(server.address) as first:
            first.begin(1, ids, [40])
            first.send(attend_layer=layer_of(1, 0, rows(40)))  # waits for others to join it
            wait_until(lambda: server.plane.gauges()["running"] > 0)
            first.call.cancel()
        wait_until(lambda: not in_step(second, ids[0]))
        second.step(2, ids, [expected])


def test_a_session_may_be_closed_while_a_layer_runs(models: Path) -> None:
    with (
        serving(models, batch_delay=0.3) as server,
        Stream(server.address) as first,
        Stream(server.address) as second,
    ):
        ids = first.open(2, num_layers=1)
        arrays = rows(8)
        first.begin(1, ids, [4, 4])
        first.send(attend_layer=layer_of(1, 0, arrays))
        wait_until(lambda: server.plane.gauges()["running"] > 0)
        second.ask(close=pb.CloseSession(session_id=ids[0]))
        plains = [plain(1), plain(1)]
        for each in plains:
            each.begin(4)
        check(result_of(first.receive()), plains, [4, 4], 0, arrays)
        plains[1].end()
        first.step(2, ids[1:], plains[1:])
        first.ask(close=pb.CloseSession(session_id=ids[1]))
        assert server.plane.kv_sessions()["pages_in_use"] == 0


def test_a_session_expires_in_the_middle_of_a_step(models: Path) -> None:
    limits = Limits(kv_lease=0.2, max_kv_lease=5)
    with serving(models, limits=limits) as server, Stream(server.address) as stream:
        ids = [*stream.open(), *stream.open(lease=60_000_000)]
        lasting = stream.ask(renew=pb.RenewSession(session_id=ids[1]))
        assert lasting.lease == 5_000_000
        stream.begin(1, ids, [3, 3])
        stream.ask(attend_layer=layer_of(1, 0, rows(6)))
        wait_until(lambda: server.plane.kv_sessions()["expired"] == 1)
        with pytest.raises(Refused, match=r"NOT_FOUND: sessions\[0\]\.session_id"):
            stream.ask(attend_layer=layer_of(1, 1, rows(6)))
        assert stream.ask(abandon_step=pb.AbandonStep(step_id=1)) == pb.Done()
        stream.step(2, [ids[1]], [plain()])


def test_sessions_of_dead_callers_expire_without_anybody_asking(models: Path) -> None:
    with serving(models, limits=Limits(kv_lease=0.3)) as server:
        with Stream(server.address) as stream:
            stream.step(1, stream.open(4), [plain() for _ in range(4)])
            assert server.plane.kv_sessions()["sessions"] == 4
        wait_until(lambda: server.plane.kv_sessions()["sessions"] == 0)
        counts = server.plane.kv_sessions()
        assert counts["expired"] == 4
        assert counts["pages_in_use"] == counts["bytes_promised"] == 0


def test_a_session_is_closed_while_others_of_its_step_go_on(stream: Stream) -> None:
    ids = stream.open(2)
    stream.begin(1, ids, [4, 4])
    stream.send(attend_layer=layer_of(1, 0, rows(8)))
    stream.send(close=pb.CloseSession(session_id=ids[0]))
    stream.send(attend_layer=layer_of(1, 1, rows(8)))
    assert stream.receive().WhichOneof("result") == "attended"
    assert stream.receive().WhichOneof("result") == "done"
    with pytest.raises(Refused, match=r"NOT_FOUND: sessions\[0\]\.session_id"):
        result_of(stream.receive())
    stream.ask(abandon_step=pb.AbandonStep(step_id=1))
    stream.step(2, ids[1:], [plain()])


def test_an_exported_session_comes_back_chunk_by_chunk(models: Path) -> None:
    limits = Limits(chunk_bytes=2048)
    with serving(models, limits=limits) as server, Stream(server.address) as stream:
        ids = stream.open(max_tokens=4000)
        expected = plain()
        for step_id in range(1, 30):
            stream.step(step_id, ids, [expected])
        stream.send(export_session=pb.ExportSession(session_id=ids[0]))
        chunks = []
        while not chunks or not chunks[-1].last:
            chunks.append(result_of(stream.receive()))
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        assert len(chunks) > 20
        request_id = stream.send(import_session=pb.ImportSession(chunk=chunks[0]))
        for chunk in chunks[1:]:
            stream.send(request_id, import_session=pb.ImportSession(chunk=chunk))
        imported = result_of(stream.receive())
        assert imported.length == expected.length
        assert imported.session_id != ids[0]
        stream.step(50, [imported.session_id], [expected.fork(expected.length)])
        stream.step(51, ids, [expected])

        request_id = stream.send(import_session=pb.ImportSession(chunk=chunks[0]))
        for chunk in chunks[2:]:
            stream.send(request_id, import_session=pb.ImportSession(chunk=chunk))
        with pytest.raises(Refused, match=r"chunk\.index: given 2; allowed: 1"):
            result_of(stream.receive())
        changed = bytearray(chunks[1].data)
        changed[-1] ^= 1
        request_id = stream.send(import_session=pb.ImportSession(chunk=chunks[0]))
        chunk = pb.SessionChunk(index=1, data=bytes(changed))
        stream.send(request_id, import_session=pb.ImportSession(chunk=chunk))
        with pytest.raises(Refused, match="DATA_LOSS"):
            result_of(stream.receive())
        chunk = pb.SessionChunk(data=b"nothing of ours" * 9, last=True)
        with pytest.raises(Refused, match="DATA_LOSS"):
            stream.ask(import_session=pb.ImportSession(chunk=chunk))
        assert server.plane.kv_sessions()["sessions"] == 2
        # Nobody need send what is left of an import that has failed.
        stream.end()
        with pytest.raises(StopIteration):
            stream.receive()


BAD_OPENINGS: list[tuple[pb.OpenSessions, str]] = [
    (opening_of(model="nope"), "NOT_FOUND: model: given 'nope'"),
    (opening_of(model=""), "INVALID_ARGUMENT: model: given nothing"),
    (opening_of(num_layers=0), "INVALID_ARGUMENT: num_layers: given 0; allowed: 1..1024"),
    (opening_of(0), "INVALID_ARGUMENT: sessions: given 0 of them; allowed: 1..1024"),
    (opening_of(max_tokens=0), r"INVALID_ARGUMENT: sessions\[0\]\.max_tokens: given 0"),
    (
        opening_of(2, max_tokens=8, reserved_tokens=9),
        r"INVALID_ARGUMENT: sessions\[0\]\.reserved_tokens: given 9; allowed: 0\.\.8",
    ),
    (opening_of(layers=[pb.LayerSpec()] * 3), "INVALID_ARGUMENT: layers: given 3 of them"),
    (
        opening_of(layers=[pb.LayerSpec(kept_first=4)]),
        r"INVALID_ARGUMENT: layers\[0\]\.kept_first: given 4",
    ),
    (opening_of(cache_type=9), "INVALID_ARGUMENT: cache_type: given 9"),
    (opening_of(cross_tokens=3), r"INVALID_ARGUMENT: sessions\[0\]\.cross_tokens: given 3"),
    (
        opening_of(900, max_tokens=1 << 20),
        r"RESOURCE_EXHAUSTED: sessions\[\d+\]: .* pages .* to promise; allowed: \d+ .*--max-kv-mib",
    ),
]


@pytest.mark.parametrize(("opening", "message"), BAD_OPENINGS)
def test_an_opening_that_is_refused_opens_nothing(
    server: AttentionServer, stream: Stream, opening: pb.OpenSessions, message: str
) -> None:
    before = server.plane.kv_sessions()["sessions"]
    with pytest.raises(Refused, match=message):
        stream.ask(open=opening)
    assert server.plane.kv_sessions()["sessions"] == before


Ids = Sequence[str]
BAD_STEPS: list[tuple[Callable[[Ids], pb.BeginStep], str]] = [
    (lambda ids: step_of(0, ids, [1, 1]), "INVALID_ARGUMENT: step_id: given 0"),
    (lambda ids: step_of(1, [], []), "INVALID_ARGUMENT: sessions: given 0 of them"),
    (lambda ids: step_of(1, ["?"], [1]), r"NOT_FOUND: sessions\[0\]\.session_id: given '\?'"),
    (lambda ids: step_of(1, [""], [1]), r"INVALID_ARGUMENT: sessions\[0\]\.session_id: given noth"),
    (lambda ids: step_of(1, [ids[0]] * 2, [1, 1]), r"INVALID_ARGUMENT: sessions\[1\]\.session_id"),
    (lambda ids: step_of(1, ids, [1, 0]), r"INVALID_ARGUMENT: sessions\[1\]\.new_tokens: given 0"),
    (
        lambda ids: step_of(1, ids, [1, 300]),
        r"RESOURCE_EXHAUSTED: sessions\[1\]\.new_tokens: given 300 .*max_tokens",
    ),
    (
        lambda ids: pb.BeginStep(
            step_id=1,
            sessions=[pb.SessionStep(session_id=ids[0], new_tokens=2, parents=[-1, 1])],
        ),
        r"INVALID_ARGUMENT: sessions\[0\]\.parents\[1\]: given 1",
    ),
    (
        lambda ids: pb.BeginStep(
            step_id=1,
            sessions=[pb.SessionStep(session_id=ids[0], new_tokens=2, prefix_hashes=b"short")],
        ),
        r"INVALID_ARGUMENT: sessions\[0\]\.prefix_hashes: given 5 bytes",
    ),
]


@pytest.mark.parametrize(("begun", "message"), BAD_STEPS)
def test_a_step_that_is_refused_harms_no_session(
    stream: Stream, begun: Callable[[Ids], pb.BeginStep], message: str
) -> None:
    ids = stream.open(2)
    plains = [plain(), plain()]
    with pytest.raises(Refused, match=message):
        stream.ask(begin_step=begun(ids))
    stream.step(1, ids, plains)


def test_sessions_of_unlike_layers_share_no_step(stream: Stream) -> None:
    ids = [*stream.open(), *stream.open(num_layers=3)]
    with pytest.raises(Refused, match=r"INVALID_ARGUMENT: sessions\[1\]\.session_id: .*layers"):
        stream.begin(1, ids, [1, 1])


def with_tensor(name: str, array: Array, dtype: int = pb.FP32) -> Callable[[pb.AttendLayer], None]:
    def change(message: pb.AttendLayer) -> None:
        changed = pb.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())  # type: ignore[arg-type]
        getattr(message, name).CopyFrom(changed)

    return change


def set_to(name: str, value: Any) -> Callable[[pb.AttendLayer], None]:
    return lambda message: setattr(message, name, value)


BAD_LAYERS: list[tuple[Callable[[pb.AttendLayer], None], str]] = [
    (set_to("step_id", 9), "NOT_FOUND: step_id: given 9; no such step is open on this stream"),
    (set_to("layer", 2), r"INVALID_ARGUMENT: layer: given 2; allowed: 0\.\.1"),
    (with_tensor("query", rows(2)[0]), r"INVALID_ARGUMENT: query\.shape: .* 3 at axis 0"),
    (with_tensor("key", rows(3)[0]), r"INVALID_ARGUMENT: key\.shape: .* 2 at axis 1"),
    (with_tensor("value", rows(3)[1]), r"INVALID_ARGUMENT: value\.shape: .* 6 at axis 2"),
    (with_tensor("query", rows(3)[0], pb.FP16), r"INVALID_ARGUMENT: query\.dtype: given FP16"),
    (lambda message: message.ClearField("key"), "INVALID_ARGUMENT: key: given nothing"),
    (lambda message: message.returns.MergeFrom(pb.LayerReturns(no_output=True)), "returns"),
    (lambda message: message.query.ClearField("data"), r"INVALID_ARGUMENT: query\.data"),
    (
        lambda message: message.query.MergeFrom(pb.Tensor(stored="a")),
        r"INVALID_ARGUMENT: query\.stored",
    ),
    (
        lambda message: message.output_region.MergeFrom(
            pb.SharedMemoryRegion(name="nope", byte_size=1 << 20)
        ),
        "NOT_FOUND",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_LAYERS)
def test_a_layer_that_is_refused_can_be_sent_again(
    stream: Stream, change: Callable[[pb.AttendLayer], None], message: str
) -> None:
    ids = stream.open()
    expected = plain()
    stream.begin(1, ids, [3])
    expected.begin(3)
    for layer in range(2):
        arrays = rows(3)
        bad = layer_of(1, layer, arrays)
        change(bad)
        with pytest.raises(Refused, match=message):
            stream.ask(attend_layer=bad)
        attended = stream.ask(attend_layer=layer_of(1, layer, arrays))
        check(attended, [expected], [3], layer, arrays)


BAD_BEGINNINGS: list[tuple[Callable[[pb.AttendLayer], None], str]] = [
    *(case for case in BAD_LAYERS if "step_id" not in case[1]),
    (lambda message: message.begin.MergeFrom(pb.BeginStep(step_id=2)), r"begin\.step_id: given 2"),
    (lambda message: message.begin.MergeFrom(pb.BeginStep(priority=9)), "priority: given 9"),
    (lambda message: message.begin.sessions.add(session_id="?", new_tokens=1), "NOT_FOUND: sess"),
    (lambda message: message.begin.ClearField("sessions"), "sessions: given 0 of them"),
]


@pytest.mark.parametrize(("change", "message"), BAD_BEGINNINGS)
def test_a_layer_that_is_refused_has_not_begun_its_step(
    stream: Stream, change: Callable[[pb.AttendLayer], None], message: str
) -> None:
    ids = stream.open()
    bad = begun_layer(1, ids, [3], 0, rows(3))
    change(bad)
    with pytest.raises(Refused, match=message):
        stream.ask(attend_layer=bad)
    with pytest.raises(Refused, match="NOT_FOUND: step_id: given 1; no such step"):
        stream.ask(attend_layer=layer_of(1, 1, rows(3)))
    assert stream.ask(truncate=pb.TruncateSession(session_id=ids[0])).length == 0
    stream.step(1, ids, [plain()])


def test_a_second_part_that_is_refused_ends_the_step_that_the_first_began(stream: Stream) -> None:
    ids = stream.open()
    query, key, value = rows(3)
    for second, message in (
        (layer_of(1, 0, (query,)), "query: given it again"),
        (begun_layer(1, ids, [3], 0, ()), "begin: given a step in the layer's second part"),
    ):
        request_id = stream.send(attend_layer=begun_layer(1, ids, [3], 0, (query,)))
        stream.send(request_id, attend_layer=second)
        with pytest.raises(Refused, match=f"INVALID_ARGUMENT: {message}"):
            result_of(stream.receive())
        assert stream.ask(truncate=pb.TruncateSession(session_id=ids[0])).length == 0
    # One that is open already goes on.
    expected = plain()
    stream.begin(1, ids, [3])
    expected.begin(3)
    with pytest.raises(Refused, match="step_id: given 1; allowed: one that no other step"):
        stream.ask(attend_layer=begun_layer(1, ids, [3], 0, (query, key, value)))
    attended = stream.ask(attend_layer=layer_of(1, 0, (query, key, value)))
    check(attended, [expected], [3], 0, (query, key, value))


def test_a_session_that_is_closed_while_its_step_is_begun_harms_no_other(models: Path) -> None:
    with (
        serving(models, batch_delay=0.3) as server,
        Stream(server.address) as first,
        Stream(server.address) as second,
    ):
        ids = first.open(2)
        query, key, value = rows(8)
        request_id = first.send(attend_layer=begun_layer(1, ids, [4, 4], 0, (query,)))
        wait_until(lambda: in_step(second, ids[1]))
        second.ask(close=pb.CloseSession(session_id=ids[0]))
        rest = pb.AttendLayer(step_id=1, key=tensor(key), value=tensor(value))
        first.send(request_id, attend_layer=rest)
        with pytest.raises(Refused, match=r"NOT_FOUND: sessions\[0\]\.session_id"):
            result_of(first.receive())
        first.step(1, ids[1:], [plain()])


def test_a_layer_in_shared_memory_gives_what_one_in_messages_gives(stream: Stream) -> None:
    block = shared_memory.SharedMemory(create=True, size=1 << 16)
    try:
        registration = pb.RegisterSharedMemoryRequest(key=f"/{block.name}", byte_size=1 << 16)
        stub = pb_grpc.AttentionServiceStub(stream.channel)
        region = stub.RegisterSharedMemory(registration).name
        ids = stream.open(2)
        plains = [plain(), plain()]
        stream.begin(1, ids, [30, 1])
        for each, length in zip(plains, (30, 1), strict=True):
            each.begin(length)
        for layer in range(2):
            arrays = rows(31)
            message = layer_of(1, layer, arrays)
            at = 0
            for one, array in zip((message.query, message.key, message.value), arrays, strict=True):
                block.buf[at : at + array.nbytes] = array.tobytes()
                one.shared_memory.CopyFrom(
                    pb.SharedMemoryRegion(name=region, offset=at, byte_size=array.nbytes)
                )
                at += -(-array.nbytes // 64) * 64
            message.output_region.CopyFrom(
                pb.SharedMemoryRegion(name=region, offset=at, byte_size=(1 << 16) - at)
            )
            attended = stream.ask(attend_layer=message)
            place = attended.output.shared_memory
            attended.output.data = bytes(block.buf[place.offset : place.offset + place.byte_size])
            assert place.offset == at
            check(attended, plains, [30, 1], layer, arrays)
    finally:
        block.close()
        block.unlink()


def test_a_layer_is_computed_once(stream: Stream) -> None:
    stream.begin(1, stream.open(), [3])
    stream.ask(attend_layer=layer_of(1, 0, rows(3)))
    with pytest.raises(Refused, match="INVALID_ARGUMENT: layer: given 0"):
        stream.ask(attend_layer=layer_of(1, 0, rows(3)))
    assert stream.ask(attend_layer=layer_of(1, 1, rows(3))).step_ended
    with pytest.raises(Refused, match="NOT_FOUND: step_id: given 1; no such step"):
        stream.ask(attend_layer=layer_of(1, 1, rows(3)))


def test_parts_that_do_not_belong_together_are_refused(stream: Stream) -> None:
    stream.begin(1, stream.open(), [3])
    query, key, value = rows(3)
    for first, second, message in (
        ((query,), layer_of(1, 0, (query,)), "query: given it again"),
        ((query,), layer_of(1, 1, (query,)), "step_id and layer: given 1, 1; allowed: 1, 0"),
        ((query,), layer_of(1, 0, (query[:2],)), r"query\.shape"),
    ):
        request_id = stream.send(attend_layer=layer_of(1, 0, first))
        stream.send(request_id, attend_layer=second)
        with pytest.raises(Refused, match=f"INVALID_ARGUMENT: {message}"):
            result_of(stream.receive())
    # Of a part that is refused the other one may be on its way.
    request_id = stream.send(attend_layer=layer_of(1, 0, (query[:2],)))
    stream.send(
        request_id, attend_layer=pb.AttendLayer(step_id=1, key=tensor(key), value=tensor(value))
    )
    with pytest.raises(Refused, match=r"query\.shape"):
        result_of(stream.receive())
    assert not stream.ask(attend_layer=layer_of(1, 0, (query, key, value))).step_ended


def test_parts_that_wait_are_bounded_and_end_with_their_step(models: Path) -> None:
    limits = Limits(max_stream_requests=3)
    with serving(models, limits=limits) as server, Stream(server.address) as stream:
        stream.begin(1, stream.open(num_layers=8), [3])
        for layer in range(3):
            stream.send(attend_layer=layer_of(1, layer, rows(3)[:1]))
        stream.send(attend_layer=layer_of(1, 3, rows(3)[:1]))
        with pytest.raises(Refused, match="RESOURCE_EXHAUSTED: requests open on this stream: 3"):
            result_of(stream.receive())
        stream.send(abandon_step=pb.AbandonStep(step_id=1))
        for _ in range(3):
            with pytest.raises(Refused, match="CANCELLED: step_id: step 1 was abandoned"):
                result_of(stream.receive())
        assert stream.receive().WhichOneof("result") == "done"


def test_a_stream_that_ends_with_parts_missing_says_so(stream: Stream) -> None:
    stream.begin(1, stream.open(), [3])
    stream.send(attend_layer=layer_of(1, 0, rows(3)[:1]))
    stream.end()
    with pytest.raises(grpc.RpcError, match="with parts of request 3 missing"):
        stream.receive()


UNKNOWN: list[dict[str, Any]] = [
    {"commit": pb.CommitTree(session_id="?", accepted=[0])},
    {"truncate": pb.TruncateSession(session_id="?")},
    {"fork": pb.ForkSession(session_id="?")},
    {"renew": pb.RenewSession(session_id="?")},
    {"close": pb.CloseSession(session_id="?")},
    {"export_session": pb.ExportSession(session_id="?")},
]


@pytest.mark.parametrize("action", UNKNOWN, ids=lambda action: next(iter(action)))
def test_sessions_that_are_unknown_are_not_found(stream: Stream, action: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=r"NOT_FOUND: session_id: given '\?'"):
        stream.ask(**action)
    stream.step(1, stream.open(), [plain()])


def test_a_session_belongs_to_whoever_opened_it(models: Path) -> None:
    try:
        server = serving(models, host="[::]", insecure=True)
        with server as running, Stream(f"[::1]:{running.port}") as mine:
            ids = mine.open()
            with Stream(f"127.0.0.1:{running.port}") as foreign:
                foreign.open()
                with pytest.raises(Refused, match="NOT_FOUND"):
                    foreign.begin(1, ids, [1])
            mine.step(1, ids, [plain()])
    except OSError:
        pytest.skip("this machine has no IPv6")


def test_the_paged_graph_is_for_sessions_alone(server: AttentionServer) -> None:
    query, key, value = (array.swapaxes(0, 1)[None].copy() for array in rows(3))
    request = pb.AttendRequest(
        model="causal", query=tensor(query), key=tensor(key), value=tensor(value)
    )
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        described = stub.GetModel(pb.GetModelRequest(name="causal")).model
        assert "paged" in [variant.name for variant in described.variants]
        assert stub.Attend(request).variant != "paged"
        request.variant = "paged"
        with pytest.raises(grpc.RpcError, match="variant: given 'paged'") as caught:
            stub.Attend(request)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_draining_server_ends_streams_that_are_owed_nothing(models: Path) -> None:
    with serving(models) as server:
        stream = Stream(server.address)
        stream.begin(1, stream.open(), [1])
    with pytest.raises(grpc.RpcError) as caught:
        stream.receive()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    stream.channel.close()


def test_an_answer_may_be_as_large_as_a_message(models: Path) -> None:
    limits = Limits(max_message_bytes=MIB, kv_page_tokens=4)
    with serving(models, limits=limits) as server, Stream(server.address) as stream:
        ids = stream.open(max_tokens=9000, num_layers=1)
        stream.begin(1, ids, [3000])
        query, key, value = rows(3000)
        request_id = stream.send(attend_layer=layer_of(1, 0, (query,), returns=pb.LayerReturns()))
        stream.send(
            request_id,
            attend_layer=pb.AttendLayer(step_id=1, key=tensor(key), value=tensor(value)),
        )
        attended = result_of(stream.receive())
        assert list(attended.output.shape) == [3000, HEADS, VALUE_DIM]


def test_counts_of_sessions_are_metrics(server: AttentionServer, stream: Stream) -> None:
    before = server.plane.kv_sessions()
    ids = stream.open(2)
    stream.step(1, ids, [plain(), plain()])
    counts = server.plane.kv_sessions()
    assert counts["sessions"] == before["sessions"] + 2
    assert counts["opened"] == before["opened"] + 2
    assert counts["tokens"] > before["tokens"]
    assert 0 < counts["bytes_in_use"] <= counts["bytes_promised"] <= counts["max_bytes"]
    names = {metric.name for metric in server.metrics.collect()}
    assert {"attnserve_kv_sessions", "attnserve_kv_bytes", "attnserve_kv_evicted_pages"} <= names
