"""Latent layers, and attention weights of sessions, against a plain cache in float64."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_proto import attention_pb2 as pb
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
    result_of,
    rows,
    step_of,
    tensor,
)
from handmade import attention, write_core
from plain_sessions import PlainLayer, PlainSession
from serving import serving

pytestmark = pytest.mark.needs_library

LATENT = pb.LayerSpec(latent=True)
TYPES = {
    "fp32": (pb.CACHE_FP32, 1e-5),
    "fp16": (pb.CACHE_FP16, 2e-3),
    "bf16": (pb.CACHE_BF16, 2e-2),
    "int8": (pb.CACHE_INT8, 4e-2),
    "fp8": (pb.CACHE_FP8, 2e-1),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    causal: dict[str, Any] = {"value_head_dim": VALUE_DIM, "mask": "causal"}
    write_core(folder, "causal", attention(HEADS, DIM, num_kv_heads=KV_HEADS, **causal))
    write_core(folder, "mla", attention(HEADS, DIM, num_kv_heads=1, **causal))
    write_core(folder, "long", attention(HEADS, DIM, value_head_dim=DIM + 1, mask="causal"))
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[AttentionServer]:
    with serving(models) as running:
        yield running


@pytest.fixture
def stream(server: AttentionServer) -> Iterator[Stream]:
    with Stream(server.address) as opened:
        yield opened


def plain_of(layers: Sequence[pb.LayerSpec]) -> PlainSession:
    return PlainSession(
        [
            PlainLayer(each.window, each.kept_first, each.cross, VALUE_DIM if each.latent else 0)
            for each in layers
        ]
    )


def latent_rows(tokens: int, kv_heads: int) -> tuple[Array, Array]:
    query = rows(tokens)[0]
    return query, generator.standard_normal((tokens, kv_heads, DIM)).astype(np.float32)


def check_weights(
    attended: pb.AttendedLayer, of: Sequence[int], plains: Sequence[PlainSession], atol: float
) -> None:
    """Compare with the plain sessions, whose layer has been computed."""
    assert len(attended.weights) == len(of)
    for given, at in zip(attended.weights, of, strict=True):
        weights = np.frombuffer(given.data, np.float32).reshape(given.shape)
        expected = plains[at].weights
        assert expected is not None
        assert weights.shape == expected.shape
        np.testing.assert_allclose(weights, expected, atol=atol, rtol=1e-4)
        assert not weights[expected == 0].any()


@pytest.mark.parametrize(("model", "kv_heads"), [("mla", 1), ("causal", KV_HEADS)])
@pytest.mark.parametrize("cache", TYPES)
def test_latent_layers_hold_keys_alone(
    server: AttentionServer, stream: Stream, cache: str, model: str, kv_heads: int
) -> None:
    layers = [LATENT, pb.LayerSpec(latent=True, window=9, kept_first=2)]
    cache_type, tolerance = TYPES[cache]
    before = server.plane.kv_sessions()["bytes_in_use"]
    ids = stream.open(2, model=model, layers=layers, cache_type=cache_type)
    plains = [plain_of(layers) for _ in ids]
    for step_id, lengths in enumerate([[40, 3], [1, 1], [1, 30], [1, 1]], 1):
        stream.begin(step_id, ids, lengths)
        for plain, length in zip(plains, lengths, strict=True):
            plain.begin(length)
        for layer in range(2):
            arrays = latent_rows(sum(lengths), kv_heads)
            returns = pb.LayerReturns(weights_of=[1])
            attended = stream.ask(attend_layer=layer_of(step_id, layer, arrays, returns=returns))
            check(attended, plains, lengths, layer, arrays, tolerance)
            check_weights(attended, [1], plains, tolerance)
        for plain in plains:
            plain.end()
    used = server.plane.kv_sessions()["bytes_in_use"] - before
    item = {"fp32": 4, "fp16": 2, "bf16": 2}.get(cache, 1)
    page = kv_heads * 16 * (DIM * item + (4 if item == 1 else 0))
    assert used == 12 * -(-page // 64) * 64  # 3 pages of 43 and of 35 tokens, in two layers
    for name in ids:
        stream.ask(close=pb.CloseSession(session_id=name))


def test_a_latent_session_forks_commits_and_moves(models: Path, stream: Stream) -> None:
    ids = stream.open(model="mla", layers=[LATENT], num_layers=1, cache_type=pb.CACHE_INT8)
    plain = plain_of([LATENT])

    def step(name: str, one: PlainSession, tokens: int, parents: list[int] | None = None) -> None:
        asked = pb.SessionStep(session_id=name, new_tokens=tokens, parents=parents)
        one.begin(tokens, parents)
        arrays = latent_rows(tokens, 1)
        begun = pb.BeginStep(sessions=[asked])
        attended = stream.ask(attend_layer=layer_of(1, 0, arrays, begin=begun))
        check(attended, [one], [tokens], 0, arrays, 4e-2)
        one.end()

    step(ids[0], plain, 20)
    step(ids[0], plain, 5, [-1, 0, 0, 2, -1])
    stream.ask(commit=pb.CommitTree(session_id=ids[0], accepted=[0, 2, 3]))
    plain.commit([0, 2, 3])
    fork = stream.ask(fork=pb.ForkSession(session_id=ids[0], length=18)).session_id
    forked = plain.fork(18)
    for _ in range(2):
        step(ids[0], plain, 7)
        step(fork, forked, 9)
    stream.send(export_session=pb.ExportSession(session_id=fork))
    chunks = []
    while not chunks or not chunks[-1].last:
        chunks.append(result_of(stream.receive()))
    request_id = stream.send(import_session=pb.ImportSession(chunk=chunks[0]))
    for chunk in chunks[1:]:
        stream.send(request_id, import_session=pb.ImportSession(chunk=chunk))
    step(result_of(stream.receive()).session_id, forked.fork(forked.length), 3)
    step(fork, forked, 1)


def test_a_latent_cross_layer_is_written_once(stream: Stream) -> None:
    layers = [LATENT, pb.LayerSpec(latent=True, cross=True)]
    (name,) = stream.open(model="mla", layers=layers, cross_tokens=30)
    plain = plain_of(layers)
    for step_id, tokens in ((1, 4), (2, 1)):
        cross = 23 if step_id == 1 else 0
        step = pb.SessionStep(session_id=name, new_tokens=tokens, cross_tokens=cross)
        stream.ask(begin_step=pb.BeginStep(step_id=step_id, sessions=[step]))
        plain.begin(tokens)
        for layer in range(2):
            query, key = latent_rows(tokens, 1)
            if layer == 1:
                key = latent_rows(23, 1)[1]
            arrays = (query, key) if layer == 0 or cross else (query,)
            returns = pb.LayerReturns(weights_of=[0])
            attended = stream.ask(attend_layer=layer_of(step_id, layer, arrays, returns=returns))
            expected, _, _ = plain.attend(layer, *arrays)
            output = np.frombuffer(attended.output.data, np.float32).reshape(expected.shape)
            np.testing.assert_allclose(output, expected, atol=1e-5, rtol=1e-5)
            check_weights(attended, [0], [plain], 1e-5)
        plain.end()


BAD_LATENT = [
    ({"layers": [LATENT, pb.LayerSpec()]}, r"INVALID_ARGUMENT: layers\[1\]\.latent: given false"),
    ({"model": "long", "layers": [LATENT]}, "FAILED_PRECONDITION: model: long .*value_head_dim 9"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_LATENT)
def test_bad_latent_layers_are_refused(stream: Stream, fields: Any, message: str) -> None:
    with pytest.raises(Refused, match=message):
        stream.ask(open=opening_of(**fields))


def test_a_latent_layer_takes_no_value(stream: Stream) -> None:
    ids = stream.open(model="mla", layers=[LATENT], num_layers=1)
    arrays = latent_rows(3, 1)
    bad = layer_of(1, 0, arrays, begin=step_of(1, ids, [3]), value=tensor(rows(3)[2]))
    with pytest.raises(Refused, match="INVALID_ARGUMENT: value: given a tensor; allowed: nothing"):
        stream.ask(attend_layer=bad)
    plain = plain_of([LATENT])
    plain.begin(3)
    # Query first, then the key.
    request_id = stream.send(attend_layer=layer_of(1, 0, arrays[:1], begin=step_of(1, ids, [3])))
    stream.send(request_id, attend_layer=pb.AttendLayer(step_id=1, key=tensor(arrays[1])))
    check(result_of(stream.receive()), [plain], [3], 0, arrays)


def test_weights_of_windows_and_trees(stream: Stream) -> None:
    layers = [pb.LayerSpec(), pb.LayerSpec(window=7, kept_first=3), pb.LayerSpec(window=30)]
    ids = stream.open(3, layers=layers, num_layers=3, max_tokens=400)
    plains = [plain_of(layers) for _ in ids]
    tree = [-1, 0, 0, 1, -1]
    steps: list[tuple[list[int], list[int]]] = [
        ([150, 3, 20], [0, 2]),
        ([1, 1, 1], [0, 1, 2]),
        ([1, 90, 2], [1]),
        ([1, 5, 1], [0, 1]),
        ([2, 1, 12], [2]),
    ]
    for step_id, (lengths, of) in enumerate(steps, 1):
        begun = step_of(step_id, ids, lengths)
        parents = tree if step_id == 4 else None
        if parents:
            begun.sessions[1].parents.extend(parents)
        stream.ask(begin_step=begun)
        for at, (plain, length) in enumerate(zip(plains, lengths, strict=True)):
            plain.begin(length, parents if at == 1 else None)
        for layer in range(3):
            arrays = rows(sum(lengths))
            returns = pb.LayerReturns(weights_of=of, log_sum_exp=bool(layer))
            attended = stream.ask(attend_layer=layer_of(step_id, layer, arrays, returns=returns))
            check(attended, plains, lengths, layer, arrays)
            check_weights(attended, of, plains, 1e-5)
        for plain in plains:
            plain.end()
        if parents:
            stream.ask(commit=pb.CommitTree(session_id=ids[1], accepted=[0, 1]))
            plains[1].commit([0, 1])


def test_weights_of_callers_that_are_computed_together(models: Path) -> None:
    with (
        serving(models, batch_delay=0.5) as server,
        Stream(server.address) as one,
        Stream(server.address) as other,
        Stream(server.address) as third,
    ):
        streams = (one, other, third)
        wanted: list[list[int]] = [[1], [], [0, 1]]
        ids = [each.open(2, num_layers=1) for each in streams]
        plains = [[plain_of([pb.LayerSpec()]) for _ in range(2)] for _ in streams]
        for lengths in ([[40, 5], [7, 1], [3, 30]], [[1, 2], [1, 1], [2, 1]]):
            sent = []
            for stream, names, each, mine, of in zip(
                streams, ids, plains, lengths, wanted, strict=True
            ):
                for plain, length in zip(each, mine, strict=True):
                    plain.begin(length)
                arrays = rows(sum(mine))
                begun = step_of(0, names, mine)
                returns = pb.LayerReturns(weights_of=of, no_output=len(of) == 2)
                stream.send(attend_layer=layer_of(1, 0, arrays, begin=begun, returns=returns))
                sent.append(arrays)
            for stream, each, mine, of, arrays in zip(
                streams, plains, lengths, wanted, sent, strict=True
            ):
                attended = result_of(stream.receive())
                if lengths[0] == [1, 2]:
                    assert attended.timings.batch_size == 6
                if len(of) == 2:
                    assert not attended.HasField("output")
                    attended.output.CopyFrom(tensor(np.zeros(0, np.float32)))
                    at = 0
                    for plain, length in zip(each, mine, strict=True):
                        plain.attend(0, *(array[at : at + length] for array in arrays))
                        at += length
                else:
                    check(attended, each, mine, 0, arrays)
                check_weights(attended, of, each, 1e-5)
                for plain in each:
                    plain.end()


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ([2], r"INVALID_ARGUMENT: returns\.weights_of\[0\]: given 2; allowed: 0\.\.1"),
        ([1, 0], r"INVALID_ARGUMENT: returns\.weights_of\[1\]: given 0; allowed: more than 1"),
    ],
)
def test_weights_of_no_session_are_refused(stream: Stream, of: list[int], message: str) -> None:
    ids = stream.open(2, num_layers=1)
    begun = step_of(1, ids, [2, 3])
    returns = pb.LayerReturns(weights_of=of)
    with pytest.raises(Refused, match=message):
        stream.ask(attend_layer=layer_of(1, 0, rows(5), begin=begun, returns=returns))
    returns = pb.LayerReturns(weights_of=[1], no_output=True)
    attended = stream.ask(attend_layer=layer_of(1, 0, rows(5), begin=begun, returns=returns))
    assert list(attended.weights[0].shape) == [3, HEADS, 3]


def test_weights_count_as_bytes_of_the_answer(models: Path) -> None:
    limits = Limits(max_response_bytes=MIB)
    with serving(models, limits=limits) as server, Stream(server.address) as stream:
        ids = stream.open(num_layers=1, max_tokens=600)
        plain = plain_of([pb.LayerSpec()])
        arrays = rows(300)
        bad = layer_of(
            1, 0, arrays, begin=step_of(1, ids, [300]), returns=pb.LayerReturns(weights_of=[0])
        )
        with pytest.raises(Refused, match=r"RESOURCE_EXHAUSTED: response size: .* 1468800 bytes"):
            stream.ask(attend_layer=bad)
        bad.returns.Clear()
        plain.begin(300)
        check(stream.ask(attend_layer=bad), [plain], [300], 0, arrays)
