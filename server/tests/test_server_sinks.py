"""Sinks and log-sum-exp, from a caller's arguments to the kernels and back."""

import asyncio
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    FailedPreconditionError,
    InvalidArgumentError,
    SessionLayer,
    merge_attention,
)
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.models import seeded
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Settings
from handmade import attention, write_core, write_layer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import np_to_triton_dtype

pytestmark = pytest.mark.needs_library
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
OWN = (0.5, -2.0, 3.0, 0.0)
DTYPES = {"half": np.float16, "brain": ml_dtypes.bfloat16}
TOLERANCES = {"half": 2e-3, "brain": 1.6e-2}
relaxed = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def sunk_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttentionServer]:
    folder = tmp_path_factory.mktemp("sunk")
    heads: dict[str, Any] = {"num_kv_heads": KV_HEADS, "value_head_dim": VALUE_DIM}
    write_core(folder, "plain", attention(HEADS, DIM, **heads))
    write_core(folder, "sunk", attention(HEADS, DIM, mask="causal", sinks=OWN, **heads))
    write_core(folder, "window", attention(HEADS, DIM, mask="causal", window=3, sinks=OWN))
    for name, dtype in (("half", "FP16"), ("brain", "BF16")):
        write_core(folder, name, attention(HEADS, DIM, sinks=OWN), dtype=dtype)
    config = LayerConfig(attention(4, 8, mask="causal", sinks=OWN), embed_dim=32, context_dim=None)
    write_layer(folder, "layer", seeded(AttentionLayer, config, 3))
    running = AttentionServer(Settings(folder, port=0, metrics_port=0, provider="cpu"))
    running.start()
    yield running
    running.drain()


@pytest.fixture(scope="module")
def address(sunk_server: AttentionServer) -> str:
    return f"127.0.0.1:{sunk_server.port}"


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[AttentionClient]:
    with AttentionClient(address) as opened:
        yield opened


def tensors(model: str, batch: int, query_len: int, key_len: int, seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    narrow = model in ("plain", "sunk")
    kv_heads, value_dim = (KV_HEADS, VALUE_DIM) if narrow else (HEADS, DIM)
    shapes = [
        (batch, HEADS, query_len, DIM),
        (batch, kv_heads, key_len, DIM),
        (batch, kv_heads, key_len, value_dim),
    ]
    dtype = DTYPES.get(model, np.float32)
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


def eager(
    arrays: list[np.ndarray], visible: np.ndarray, sinks: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, weights and log-sum-exp as transformers has sinks, in float64: one more column."""
    q, k, v = (torch.from_numpy(array.astype(np.float64)) for array in arrays)
    k, v = (heads.repeat_interleave(HEADS // heads.shape[1], 1) for heads in (k, v))
    scores = q @ k.transpose(2, 3) * DIM**-0.5
    scores = scores.masked_fill(~torch.tensor(np.broadcast_to(visible, scores.shape)), -np.inf)
    column = torch.tensor(sinks, dtype=torch.float64)[None, :, None, None]
    scores = torch.cat([scores, column.expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))[..., :-1]
    return (weights @ v).numpy(), weights.numpy(), torch.logsumexp(scores, dim=-1).numpy()


@relaxed
@given(
    model=st.sampled_from(["plain", "sunk", "window", "half", "brain"]),
    variant=st.sampled_from(["", "native", "blocked_sinks", "reference_sinks"]),
    batch=st.integers(1, 3),
    query_len=st.integers(1, 30),
    key_len=st.integers(1, 60),
    sinks=st.none()
    | st.lists(st.sampled_from([-np.inf, -5.0, 0.0, 1.5, 40.0]), min_size=4, max_size=4),
    weights=st.booleans(),
    entropy=st.booleans(),
    log_sum_exp=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_request_is_eager_attention_whatever_is_returned(
    client: AttentionClient,
    model: str,
    variant: str,
    batch: int,
    query_len: int,
    key_len: int,
    sinks: list[float] | None,
    weights: bool,
    entropy: bool,
    log_sum_exp: bool,
    seed: int,
) -> None:
    arrays = tensors(model, batch, query_len, key_len, seed)
    lengths = np.random.default_rng(seed).integers(0, key_len + 1, batch)
    keys, rows = np.arange(key_len), np.arange(query_len)[:, None]
    visible = keys < lengths[:, None, None, None]
    if model in ("sunk", "window"):
        visible = visible & (keys <= rows)
    if model == "window":
        visible = visible & (keys > rows - 3)
    used = sinks or ([-np.inf] * HEADS if model == "plain" else OWN)
    output, expected_weights, rows_of = eager(arrays, visible, used)
    tolerance = TOLERANCES.get(model, 3e-6 * key_len**0.5)
    asked: dict[str, Any] = {
        "return_weights": weights and variant in ("", "reference_sinks"),
        "return_entropy": entropy,
        "return_log_sum_exp": log_sum_exp,
    }
    result = client.attend(
        *arrays, model=model, variant=variant, key_lengths=lengths, sinks=sinks, **asked
    )
    np.testing.assert_allclose(result.output.astype(np.float64), output, atol=tolerance)
    alone = client.attend(*arrays, model=model, key_lengths=lengths, sinks=sinks)
    np.testing.assert_allclose(
        result.output.astype(np.float64), alone.output.astype(np.float64), atol=2 * tolerance
    )
    if asked["return_weights"]:
        np.testing.assert_allclose(
            result.weights.astype(np.float64), expected_weights, atol=tolerance
        )
    if entropy:
        exact = torch.special.entr(torch.from_numpy(expected_weights)).sum(-1).numpy()
        np.testing.assert_allclose(result.entropy, exact, atol=10 * tolerance)
    if log_sum_exp:
        np.testing.assert_allclose(result.log_sum_exp, rows_of, atol=1e-5, rtol=1e-6)


def test_a_model_says_its_sinks_and_a_request_replaces_them(client: AttentionClient) -> None:
    assert client.get_model("sunk").sinks == OWN
    assert client.get_model("plain").sinks == ()
    arrays = tensors("sunk", 2, 20, 20, 1)
    own = client.attend(*arrays, model="sunk").output
    np.testing.assert_array_equal(client.attend(*arrays, model="sunk", sinks=OWN).output, own)
    none = client.attend(*arrays, model="sunk", sinks=[-np.inf] * HEADS).output
    assert np.abs(none - own).max() > 0.1
    expected, _, _ = eager(arrays, np.tri(20, dtype=bool), [-np.inf] * HEADS)
    np.testing.assert_allclose(none, expected, atol=1e-5)


def test_what_weights_say_leaves_out_what_sinks_take(client: AttentionClient) -> None:
    arrays = tensors("sunk", 1, 17, 17, 2)
    _, weights, rows = eager(arrays, np.tri(17, dtype=bool), OWN)
    for more in ({}, {"variant": "reference"}):
        said = client.attend(
            *arrays, model="sunk", top_k=2, return_mass_per_key=True, mass_by_distance=3,
            return_entropy=True, return_output=False, return_log_sum_exp=True, **more,
        )  # fmt: skip
        np.testing.assert_allclose(said.mass_per_key, weights.sum(2), atol=1e-5)
        np.testing.assert_allclose(said.mass_by_distance.sum(-1), weights.sum((2, 3)), atol=1e-5)
        picked = np.take_along_axis(weights, said.top_k_indices, -1)
        np.testing.assert_allclose(said.top_k_weights, picked, atol=1e-6)
        np.testing.assert_allclose(said.log_sum_exp, rows, atol=1e-5)
        # What is left of each row is the sink's.
        np.testing.assert_allclose(said.sink_mass(OWN), 1 - weights.sum(-1), atol=1e-5)
    none = client.attend(
        *arrays, model="sunk", sinks=[-np.inf] * HEADS, key_lengths=[0], return_log_sum_exp=True
    )
    assert np.isneginf(none.log_sum_exp).all()
    assert (none.sink_mass([-np.inf] * HEADS) == 0).all()
    with pytest.raises(ValueError, match=r"sinks: given shape \[1\]; allowed: \[4\]"):
        none.sink_mass([1.0])
    with pytest.raises(ValueError, match="given no log_sum_exp"):
        client.attend(*arrays, model="sunk").sink_mass(OWN)


@relaxed
@given(
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    query_len=st.integers(1, 9),
    model=st.sampled_from(["plain", "half"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_parts_merge_into_the_whole(
    client: AttentionClient, cuts: list[int], query_len: int, model: str, seed: int
) -> None:
    """Keys in parts, some of them empty for some sequences; sinks in the first part."""
    arrays = tensors(model, 2, query_len, 41, seed)
    lengths = np.random.default_rng(seed).integers(0, 42, 2)
    none = [-np.inf] * HEADS
    starts = [0, *sorted(cuts), 41]
    outputs, rows = [], []
    for part, (first, last) in enumerate(itertools.pairwise(starts)):
        if first == last:
            continue
        keys = [array[:, :, first:last] for array in arrays[1:]]
        said = client.attend(
            arrays[0], *keys, model=model, key_lengths=(lengths - first).clip(0, last - first),
            sinks=none if outputs else OWN, return_log_sum_exp=True,
        )  # fmt: skip
        outputs.append(said.output)
        rows.append(said.log_sum_exp)
        assert part == 0 or said.output.shape == outputs[0].shape
    whole = client.attend(
        *arrays, model=model, key_lengths=lengths, sinks=OWN, return_log_sum_exp=True
    )
    output, log_sum_exp = merge_attention(outputs, rows)
    assert output.dtype == whole.output.dtype
    tolerance = 1e-5 if model == "plain" else 4e-3
    np.testing.assert_allclose(output, whole.output, atol=tolerance)
    np.testing.assert_allclose(log_sum_exp, whole.log_sum_exp, atol=1e-5)
    # And in twos, in any order.
    merged = outputs[-1], rows[-1]
    for other in range(len(outputs) - 1):
        merged = merge_attention([merged[0], outputs[other]], [merged[1], rows[other]])
    np.testing.assert_allclose(merged[0], output, atol=tolerance)


def test_wrong_parts_are_refused() -> None:
    output, rows = np.zeros((1, 2, 3, 4), np.float32), np.zeros((1, 2, 3), np.float32)
    with pytest.raises(ValueError, match="given 0 for 0 outputs"):
        merge_attention([], [])
    with pytest.raises(ValueError, match="given 1 for 2 outputs"):
        merge_attention([output, output], [rows])
    with pytest.raises(ValueError, match=r"outputs\[1\]: given shape \[1, 2, 3, 5\]"):
        merge_attention([output, np.zeros((1, 2, 3, 5))], [rows, rows])
    with pytest.raises(ValueError, match=r"log_sum_exps\[0\]: given shape \[1, 2, 3, 4\]"):
        merge_attention([output], [output])


def test_requests_with_and_without_run_beside_each_other(address: str) -> None:
    """Many at once, of lengths that are joined; each gets what it gets alone."""
    kinds: list[dict[str, Any]] = [
        {},
        {"return_log_sum_exp": True},
        {"sinks": [0.0, 1.0, 2.0, 3.0]},
        {"sinks": [3.0, 2.0, 1.0, 0.0], "return_log_sum_exp": True},
    ]

    async def run() -> None:
        async with AsyncAttentionClient(address) as client:
            calls = [
                (tensors("sunk", 1, 20 + n % 3, 20 + n % 3, n), kinds[n % len(kinds)])
                for n in range(32)
            ]
            asked = [client.attend(*arrays, model="sunk", **kind) for arrays, kind in calls]
            for (arrays, kind), said in zip(calls, await asyncio.gather(*asked), strict=True):
                visible = np.tri(arrays[0].shape[2], dtype=bool)
                output, _, rows = eager(arrays, visible, kind.get("sinks", OWN))
                np.testing.assert_allclose(said.output, output, atol=1e-5)
                if "return_log_sum_exp" in kind:
                    np.testing.assert_allclose(said.log_sum_exp, rows, atol=1e-5)
                else:
                    assert said.log_sum_exp is None

    asyncio.run(run())


def test_packed_sequences_have_them_too(client: AttentionClient) -> None:
    arrays = tensors("sunk", 1, 30, 30, 5)
    said = client.attend(
        *arrays, model="sunk", cu_seqlens_q=[0, 7, 7, 30], return_log_sum_exp=True,
        return_entropy=True,
    )  # fmt: skip
    part = np.arange(30) >= 7
    visible = np.tri(30, dtype=bool) & (part[:, None] == part)
    output, weights, rows = eager(arrays, visible, OWN)
    np.testing.assert_allclose(said.output, output, atol=1e-5)
    np.testing.assert_allclose(said.log_sum_exp, rows, atol=1e-5)
    entropy = torch.special.entr(torch.from_numpy(weights)).sum(-1).numpy()
    np.testing.assert_allclose(said.entropy, entropy, atol=1e-4)


def told(session: Any, arrays: list[np.ndarray], first: int, last: int, **more: Any) -> Any:
    """A step of tokens first..last of one sequence, one layer."""
    query, key, value = (array[0, :, first:last].swapaxes(0, 1) for array in arrays)
    return session.attend(
        0, query, key, value, return_log_sum_exp=True, return_entropy=True, **more
    )


@pytest.mark.parametrize("sinks", [None, [0.0, -np.inf, 2.0, 30.0]])
def test_sessions_have_the_models_sinks_or_their_layers_own(
    client: AttentionClient, sinks: list[float] | None, tmp_path: Path
) -> None:
    arrays = tensors("sunk", 1, 40, 40, 10)
    used = OWN if sinks is None else sinks
    output, weights, rows = eager(arrays, np.tri(40, dtype=bool), used)
    entropy = torch.special.entr(torch.from_numpy(weights)).sum(-1).numpy()

    def check(said: Any, first: int, last: int) -> None:
        part = slice(first, last)
        np.testing.assert_allclose(said.output, output[0, :, part].swapaxes(0, 1), atol=1e-5)
        np.testing.assert_allclose(said.log_sum_exp, rows[0, :, part].T, atol=1e-5)
        np.testing.assert_allclose(said.entropy, entropy[0, :, part].T, atol=1e-4)
        if said.weights:
            (of_session,) = said.weights
            expected = weights[0, :, part, :last].swapaxes(0, 1)
            np.testing.assert_allclose(of_session, expected, atol=1e-5)

    layers = None if sinks is None else [SessionLayer(sinks=sinks)]
    with client.session("sunk", num_layers=1, max_tokens=64, layers=layers) as session:
        check(told(session, arrays, 0, 30, return_weights=True), 0, 30)
        check(told(session, arrays, 30, 31, return_weights=True), 30, 31)
        branch = session.fork()
        check(told(branch, arrays, 31, 40), 31, 40)
        branch.close()
        client.save(session, tmp_path / "session")
    moved = client.load(tmp_path / "session")
    check(told(moved, arrays, 31, 32), 31, 32)
    moved.close()


def test_sessions_of_unlike_sinks_take_steps_at_once(client: AttentionClient) -> None:
    """Their layers would be one run if their sinks were alike."""
    kinds = [None, [0.0] * 4, [3.0, 2.0, 1.0, 0.0], None]
    all_arrays = [tensors("sunk", 1, 8, 8, 20 + n) for n in range(len(kinds))]
    sessions = [
        client.session(
            "sunk", num_layers=1, max_tokens=16,
            layers=None if sinks is None else [SessionLayer(sinks=sinks)],
        )
        for sinks in kinds
    ]  # fmt: skip
    with ThreadPoolExecutor(len(kinds)) as threads:
        steps = list(threads.map(lambda one, arrays: told(one, arrays, 0, 8), sessions, all_arrays))
    for sinks, arrays, said, session in zip(kinds, all_arrays, steps, sessions, strict=True):
        output, _, _ = eager(arrays, np.tri(8, dtype=bool), OWN if sinks is None else sinks)
        np.testing.assert_allclose(said.output, output[0].swapaxes(0, 1), atol=1e-5)
        session.close()


@pytest.mark.parametrize(
    ("model", "sinks", "message"),
    [
        ("sunk", [1.0], r"layers\[0\].sinks: given 1 of them; allowed: none, or 4"),
        ("sunk", [0.0, np.nan, 0, 0], r"layers\[0\].sinks\[1\]: given nan; allowed: finite"),
        ("layer", [0.0] * 4, r"layers\[0\].sinks: given 4 of them; allowed: none, as layer is"),
    ],
)
def test_wrong_sinks_of_a_session_are_refused(
    client: AttentionClient, model: str, sinks: list[float], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        client.session(model, num_layers=1, max_tokens=8, layers=[SessionLayer(sinks=sinks)])


def test_a_layer_model_keeps_sessions_with_its_sinks(client: AttentionClient) -> None:
    hidden = np.random.default_rng(11).standard_normal((12, 32), np.float32)
    whole = client.attend(hidden_states=hidden[None], model="layer").output[0]
    with client.session("layer", num_layers=1, max_tokens=16) as session:
        parts = [
            session.attend(0, hidden_states=hidden[a:b]).output
            for a, b in ((0, 7), (7, 8), (8, 12))
        ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


def test_a_layer_with_sinks_gives_the_same_by_every_variant(client: AttentionClient) -> None:
    hidden = np.random.default_rng(6).standard_normal((2, 9, 32), np.float32)
    said = [
        client.attend(hidden_states=hidden, model="layer", variant=name, return_log_sum_exp=True)
        for name in ("native", "blocked", "reference")
    ]
    for other in said[1:]:
        np.testing.assert_allclose(other.output, said[0].output, atol=1e-5)
        np.testing.assert_allclose(other.log_sum_exp, said[0].log_sum_exp, atol=1e-5)
    with pytest.raises(FailedPreconditionError, match="it takes no sinks"):
        client.attend(hidden_states=hidden, model="layer", sinks=OWN)


def test_large_requests_are_computed_some_heads_at_a_time(client: AttentionClient) -> None:
    """Over a stream, whose first heads are computed before the last are there."""
    arrays = [np.tile(array, (1, 1, 200, 1)) for array in tensors("window", 1, 300, 300, 7)]
    parts = client.attend(*arrays, model="window").output
    with client.stream() as stream:
        whole = stream.submit(*arrays, model="window", return_log_sum_exp=True).result()
    np.testing.assert_allclose(parts, whole.output, atol=1e-5)
    assert np.isfinite(whole.log_sum_exp).all()


def test_shared_memory_has_room_for_them(address: str) -> None:
    arrays = tensors("sunk", 1, 20, 20, 8)
    with AttentionClient(address, shared_memory=True) as client:
        shared = [client.shared(array) for array in arrays]
        said = client.attend(*shared, model="sunk", sinks=OWN, return_log_sum_exp=True)
    output, _, rows = eager(arrays, np.tri(20, dtype=bool), OWN)
    np.testing.assert_allclose(said.output, output, atol=1e-5)
    np.testing.assert_allclose(said.log_sum_exp, rows, atol=1e-5)


def test_the_open_inference_protocol_has_them_by_name(address: str) -> None:
    names = ("query", "key", "value")
    arrays = dict(zip(names, tensors("sunk", 1, 12, 12, 9), strict=True))
    sinks = np.array([1, 0, -1, 2], np.float32)
    given = [triton.InferInput(n, a.shape, np_to_triton_dtype(a.dtype)) for n, a in arrays.items()]
    given.append(triton.InferInput("sinks", sinks.shape, "FP32"))
    for tensor, array in zip(given, [*arrays.values(), sinks], strict=True):
        tensor.set_data_from_numpy(array)
    asked = [triton.InferRequestedOutput(name) for name in ("output", "log_sum_exp")]
    with triton.InferenceServerClient(address) as client:
        metadata = client.get_model_metadata("sunk")
        answer = client.infer("sunk", given, outputs=asked)
    assert [list(t.shape) for t in metadata.inputs if t.name == "sinks"] == [[HEADS]]
    assert "log_sum_exp" in [t.name for t in metadata.outputs]
    output, _, rows = eager(list(arrays.values()), np.tri(12, dtype=bool), sinks)
    np.testing.assert_allclose(answer.as_numpy("output"), output, atol=1e-5)
    np.testing.assert_allclose(answer.as_numpy("log_sum_exp"), rows, atol=1e-5)


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        ([1.0], r"sinks.shape: given \[1\]; allowed: 4 at axis 0 \(num_heads of the model\)"),
        ([[1.0] * 4], r"sinks.shape: given \[1, 4\] of rank 2; allowed: rank 1, \[H\]"),
        ([0.0, np.nan, 0.0, 0.0], r"sinks\[1\]: given nan; allowed: finite numbers and -infinity"),
        ([0.0, 0.0, np.inf, 0.0], r"sinks\[2\]: given inf; allowed: finite numbers and -infinity"),
    ],
)
def test_wrong_sinks_are_refused(client: AttentionClient, sinks: list, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        client.attend(*tensors("sunk", 1, 3, 3, 0), model="sunk", sinks=sinks)


def test_a_variant_without_them_says_so(client: AttentionClient) -> None:
    arrays = tensors("plain", 1, 3, 3, 0)
    with pytest.raises(FailedPreconditionError, match="it gives no log_sum_exp"):
        client.attend(*arrays, model="plain", variant="blocked", return_log_sum_exp=True)
    with pytest.raises(FailedPreconditionError, match="it takes no sinks"):
        client.attend(*arrays, model="plain", variant="fused", sinks=OWN)


def test_the_command_line_prints_and_writes_them(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attnserve_client._cli import main

    given, written = tmp_path / "in.npz", tmp_path / "out.npz"
    arrays = dict(zip(("query", "key", "value"), tensors("sunk", 1, 5, 5, 3), strict=True))
    np.savez(given, **arrays, sinks=np.zeros(HEADS))  # type: ignore[arg-type]
    command = ["--target", address, "attend", "--model", "sunk", "--input", str(given)]
    assert main([*command, "--log-sum-exp", "--output", str(written)]) == 0
    assert "log_sum_exp: [1, 4, 5] float32" in capsys.readouterr().out
    _, _, rows = eager(list(arrays.values()), np.tri(5, dtype=bool), [0.0] * HEADS)
    np.testing.assert_allclose(np.load(written)["log_sum_exp"], rows, atol=1e-5)
    assert main(["--target", address, "info"]) == 0
    assert "4 heads of 8, 2 for keys and values, sinks" in capsys.readouterr().out
