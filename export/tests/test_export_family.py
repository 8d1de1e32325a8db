"""The whole family of attentions, every variant, on shapes drawn at random."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from attnserve_export import sessions, tuning
from attnserve_export.attention.core import AttentionConfig
from attnserve_export.attention.paged import has_paged
from attnserve_export.attention.positions import Rotary, alibi_slopes
from attnserve_export.attention.variants import core_specs
from attnserve_export.cases import scheme_of, sinks_of
from attnserve_export.cli import main
from attnserve_export.models import core_graph
from attnserve_export.reference import attention_reference, attention_with_log_sum_exp
from attnserve_export.tuning import Measurement, picks_from
from attnserve_export.verification import angle_tolerance, log_sum_exp_magnitudes
from hypothesis import given, settings
from hypothesis import strategies as st

# Options of `attnserve-export core`, and the same as a config.
FAMILY: dict[str, tuple[str, dict]] = {
    "bottom": ("--mask causal --alignment bottom-right", {
        "mask": "causal", "alignment": "bottom-right"}),
    "window": ("--mask causal --window 7", {"mask": "causal", "window": 7}),
    "both": ("--window 5 --window-right 2", {"window": 5, "window_right": 2}),
    "band": ("--window 130", {"window": 130, "window_right": 129}),
    "ahead": ("--window-right 3 --mask cross", {"window_right": 3, "mask": "cross"}),
    "alibi": ("--mask causal --alibi", {"mask": "causal", "alibi": True}),
    "turned": ("--mask causal --rotary half --alignment bottom-right --window 9", {
        "mask": "causal", "rotary": Rotary("half", 8), "alignment": "bottom-right", "window": 9}),
    "gptj": ("--mask causal --rotary interleaved --rotary-dims 4 --rotary-base 500", {
        "mask": "causal", "rotary": Rotary("interleaved", 4, 500.0)}),
    "gemma": ("--mask causal --softcap 3 --window 6 --scale 0.5", {
        "mask": "causal", "softcap": 3.0, "window": 6, "scale": 0.5}),
    "brain": ("--mask causal --alibi --dtype bf16 --window 20 --sinks=-2,0,1.5,3,0.25,-7", {
        "mask": "causal", "alibi": True, "window": 20,
        "sinks": (-2.0, 0.0, 1.5, 3.0, 0.25, -7.0)}),
    "half": ("--rotary interleaved --rotary-dims 4 --rotary-base 500 --dtype fp16 --window 130", {
        "rotary": Rotary("interleaved", 4, 500.0), "window": 130, "window_right": 129}),
    "sunk": ("--mask causal --window 9 --softcap 4 --scale 0.5 --sinks=-2,0,1.5,3,0.25,-7", {
        "mask": "causal", "window": 9, "softcap": 4.0, "scale": 0.5,
        "sinks": (-2.0, 0.0, 1.5, 3.0, 0.25, -7.0)}),
}  # fmt: skip
# What they have, another has too; `-m slow` has them all.
SLOW = ("bottom", "window", "both", "band", "ahead", "alibi", "gptj", "gemma", "sunk")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILY]
HEADS, KV_HEADS, DIM, VALUE_DIM = 6, 2, 8, 5
DTYPES = {"FP32": np.float32, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}
TOLERANCE = {"FP16": 2e-3, "BF16": 1.6e-2}


@pytest.fixture(scope="module")
def family(
    tmp_path_factory: pytest.TempPathFactory, export_all: Callable[[list[list[str]]], None]
) -> Callable[[str], Path]:
    """Where a model is, which is exported when it is first asked for."""
    out = tmp_path_factory.mktemp("family")
    sizes = ["--num-heads", "6", "--num-kv-heads", "2", "--head-dim", "8", "--value-head-dim", "5"]

    def folder(name: str) -> Path:
        if not (out / name).exists():
            command = ["core", "--out", str(out), *sizes, "--name", name]
            export_all([[*command, *FAMILY[name][0].split()]])
        return out / name / "1"

    return folder


@cache
def opened(path: Path) -> onnxruntime.InferenceSession:
    return sessions.open_session(path)


def config_of(name: str) -> AttentionConfig:
    settings_of = {"mask": "bidirectional", "scale": DIM**-0.5} | FAMILY[name][1]
    return AttentionConfig(HEADS, DIM, KV_HEADS, VALUE_DIM, **settings_of)


# One has another softcap, the others are for other requests.
NOT_RUN = ("softcap", "paged", "packed", "packed_weights")

# On both sides of blocks (16 to 128 queries) and of the windows.
lengths = st.integers(1, 24) | st.sampled_from([127, 128, 129, 150, 260])


@settings(deadline=None, max_examples=10)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_at_any_shape(
    family: Callable[[str], Path], name: str, data: st.DataObject, seed: int
) -> None:
    config = config_of(name)
    manifest = json.loads((family(name) / "model.json").read_text())
    dtype = DTYPES[manifest["dtype"]]
    generator = np.random.default_rng(seed)
    batch, sq, sk = data.draw(st.integers(1, 3)), data.draw(lengths), data.draw(lengths)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(dtype)

    feeds = {
        "query": normal(batch, HEADS, sq, DIM),
        "key": normal(batch, KV_HEADS, sk, DIM),
        "value": normal(batch, KV_HEADS, sk, VALUE_DIM),
        "key_lengths": generator.integers(0, sk + 1, batch),
        "bias": np.zeros((1, 1, 1, 1), dtype),
        "mask": np.ones((1, 1, 1, 1), bool),
        "prefix_lengths": np.zeros(batch, np.int64),
        "softcap": np.array([-1.0], np.float32),
        "sinks": sinks_of(config),
    }
    expected, weights, rows = attention_with_log_sum_exp(
        feeds["query"], feeds["key"], feeds["value"], key_lengths=feeds["key_lengths"],
        sinks=config.sinks, scheme=scheme_of(config), scale=config.scale, softcap=config.softcap,
    )  # fmt: skip
    # FP32 rounds scores relative to their size, which ALiBi makes large.
    largest = max(config.slopes or [0.0]) * max(sq, sk)
    exact = 2e-6 * np.sqrt(sk) * max(1.0, largest / 8)
    if config.rotary is not None:
        exact += angle_tolerance(max(sq, sk))
    tolerance = TOLERANCE.get(manifest["dtype"], exact)
    for variant in manifest["variants"]:
        outputs = {entry["name"] for entry in variant["outputs"]}
        if "output" not in outputs or variant["name"] in NOT_RUN:
            continue
        right = {"output": expected, "weights": weights, "log_sum_exp": rows}
        answers = sessions.run(
            opened(family(name) / variant["file"]),
            feeds,
            {n: array.shape for n, array in right.items() if n in outputs},
        )
        for key, answer in answers.items():
            allowed = tolerance
            if key == "log_sum_exp":
                allowed = exact * log_sum_exp_magnitudes(rows)
                # -inf where nothing is seen, of which no difference can be taken.
                np.testing.assert_array_equal(np.isneginf(answer), np.isneginf(rows))
            exact_answer = answer.astype(np.float64)
            with np.errstate(invalid="ignore"):
                difference = np.abs(exact_answer - right[key])
            difference[exact_answer == right[key]] = 0
            assert (difference <= allowed).all(), (variant["name"], key, difference.max(), allowed)


@pytest.mark.needs_library
@pytest.mark.parametrize("name", NAMES)
def test_no_variant_of_the_family_is_missing(family: Callable[[str], Path], name: str) -> None:
    manifest = json.loads((family(name) / "model.json").read_text())
    config = config_of(name)
    expected = {"blocked", "reference", "softcap", "native", "diagnostics"}
    expected |= {
        "packed",
        "packed_diagnostics",
        "packed_weights",
        "blocked_sinks",
        "reference_sinks",
    }
    if not config.softcap and not config.alibi:
        expected.add("fused")
    if has_paged(config):
        expected.add("paged")
    assert {v["name"] for v in manifest["variants"]} == expected
    attention = manifest["attention"]
    assert attention["window"] == config.window
    assert attention["window_right"] == config.window_right
    assert attention["alignment"] == config.alignment


@pytest.mark.parametrize(
    ("name", "file", "function"),
    [
        ("turned", "model.blocked.onnx", "BlockedAttention"),
        ("brain", "model.onnx", "BlockedSinksAttention"),
    ],
)
def test_blocked_needs_no_operators_of_ours(
    family: Callable[[str], Path], name: str, file: str, function: str
) -> None:
    """Any ONNX Runtime runs it: its operator is a function that the graph brings along."""
    path = family(name) / file
    model = onnx.load(path)
    assert [each.name for each in model.functions] == [function]
    onnx.checker.check_model(model, full_check=False)
    assert onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) is not None


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), style=st.sampled_from(["half", "interleaved"]))
def test_rotary_is_what_transformers_does(seed: int, style: str) -> None:
    """Llama's (half) and GPT-J's (interleaved) own functions."""
    from transformers.models.gptj import modeling_gptj as gptj
    from transformers.models.llama import modeling_llama as llama

    torch.manual_seed(seed)
    heads = torch.randn(2, 3, 9, 8, dtype=torch.float64).float()
    positions = torch.arange(9)[None]
    angles = positions[0, :, None] * 10_000 ** -(torch.arange(0, 8, 2) / 8)
    turned = Rotary(style, 8).rotate(heads, positions)
    if style == "half":
        both = torch.cat((angles, angles), dim=-1)[None]
        expected, _ = llama.apply_rotary_pos_emb(heads, heads, both.cos(), both.sin())
    else:
        sine, cosine = angles.sin()[None], angles.cos()[None]
        expected = gptj.apply_rotary_pos_emb(heads.transpose(1, 2), sine, cosine).transpose(1, 2)
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_alibi_slopes_are_those_of_transformers() -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for num_heads in (1, 2, 6, 8, 12, 32, 112):
        alibi = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float64)
        np.testing.assert_allclose(alibi_slopes(num_heads), alibi[:, 0, 1].numpy(), rtol=1e-6)


def test_bottom_right_is_torchs_causal_lower_right() -> None:
    from torch.nn.attention.bias import causal_lower_right

    torch.manual_seed(3)
    q, k = torch.randn(1, 2, 4, 8).double(), torch.randn(1, 2, 9, 8).double()
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), k.float(), attn_mask=causal_lower_right(4, 9)
    )
    config = AttentionConfig(2, 8, 2, 8, "causal", 8**-0.5, alignment="bottom-right")
    output, _ = attention_reference(q, k, k, scheme=scheme_of(config))
    np.testing.assert_allclose(output, expected.numpy(), atol=1e-5)


@pytest.mark.needs_library
def test_tuning_measures_and_the_manifest_says_so(
    family: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = family("turned").parents[1]
    arguments = ["tune", "--out", str(out), "--name", "turned", "--seq-lens", "8,64"]
    assert main([*arguments, "--seconds", "0.3"]) == 0
    printed = capsys.readouterr()
    assert "64 positions: " in printed.err
    manifest = json.loads((family("turned") / "model.json").read_text())
    tuned = manifest["tuned"]["CPUExecutionProvider"]
    assert {m["seq_len"] for m in tuned["measurements"]} == {8, 64}
    assert all(m["milliseconds"] > 0 for m in tuned["measurements"])
    rows = manifest["picks"]["CPUExecutionProvider"]
    assert rows[-1]["up_to"] is None
    names = {"fused", "blocked", "reference", "native"}
    assert all(set(row["variants"]) == names for row in rows)
    assert "CUDAExecutionProvider" in manifest["picks"]


@pytest.mark.needs_library
def test_tuning_that_is_interrupted_keeps_what_it_measured(
    family: Callable[[str], Path],
) -> None:
    folder = family("turned")
    before = json.loads((folder / "model.json").read_text())["picks"]["CPUExecutionProvider"]

    def interrupt(said: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuning.tune(
            folder,
            seq_lens=(8, 64),
            provider="CPUExecutionProvider",
            batch=1,
            seconds=0.2,
            progress=interrupt,
        )
    manifest = json.loads((folder / "model.json").read_text())
    measured = manifest["tuned"]["CPUExecutionProvider"]["measurements"]
    assert {each["seq_len"] for each in measured} == {8}
    rows = manifest["picks"]["CPUExecutionProvider"]
    assert rows[0]["variants"][0] == min(measured, key=lambda m: m["milliseconds"])["variant"]
    # What is longer than was measured is as it was.
    assert rows[-1] == before[-1]


def test_picks_follow_the_measurements() -> None:
    measured = [
        Measurement("a", 100, 1.0), Measurement("b", 100, 2.0),
        Measurement("a", 400, 9.0), Measurement("b", 400, 8.0),
        Measurement("b", 1600, 30.0),
    ]  # fmt: skip
    rows = picks_from(measured)
    assert [(row.up_to, row.variants) for row in rows] == [(200, ("a", "b")), (None, ("b", "a"))]


def test_tuning_refuses_what_it_cannot_measure(
    family: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["tune", "--out", str(family("half").parents[1]), "--name", "nothing"]) == 2
    assert "model.json" in capsys.readouterr().err
    monkeypatch.setattr(
        tuning.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"]
    )
    arguments = ["tune", "--out", str(family("half").parents[1]), "--name", "half"]
    assert main([*arguments, "--provider", "CUDAExecutionProvider"]) == 2
    assert "available here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mask causal --window-right 3", "--window-right: given with --mask causal"),
        ("--rotary half --rotary-dims 9", "--rotary-dims: given 9"),
        ("--rotary half --rotary-dims 5", "--rotary-dims: given 5"),
        ("--rotary-dims 4", "--rotary-dims: given without --rotary"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["core", "--out", str(tmp_path), "--name", "x", "--num-heads", "2"]
    assert main([*arguments, "--head-dim", "8", *options.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in tuning.onnxruntime.get_available_providers(),
    reason="this ONNX Runtime knows no CUDA",
)
def test_tuning_for_cuda_without_a_gpu_changes_nothing(
    family: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = family("half") / "model.json"
    before = path.read_bytes()
    arguments = [
        "tune",
        "--out",
        str(family("half").parents[1]),
        "--name",
        "half",
        "--seq-lens",
        "8",
    ]
    code = main([*arguments, "--provider", "CUDAExecutionProvider"])
    if code == 0:
        pytest.skip("there is a GPU")
    assert "which does not work here" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("option", ["--window 3", "--alibi", "--rotary half", "--softcap 2"])
def test_multihead_attention_has_no_such_options(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["layer", "--out", str(tmp_path), "--name", "x", "--num-heads", "2"]
    arguments += ["--embed-dim", "16", "--module", "multihead", "--mask", "causal"]
    assert main([*arguments, *option.split()]) == 2
    assert f"given multihead with {option.split()[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        "--window 0", "--window 9223372036854775808", "--window-right -1", "--scale 1e300",
        "--softcap 1e-320", "--num-kv-heads ²", "--opset 99",
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["core", "--out", str(tmp_path), "--name", "x", "--num-heads", "2"]
    with pytest.raises(SystemExit):
        main([*arguments, "--head-dim", "8", *option.split()])
    assert "allowed: " in capsys.readouterr().err


def test_a_layer_in_bfloat16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["layer", "--out", str(tmp_path), "--name", "x", "--num-heads", "2"]
    assert main([*arguments, "--embed-dim", "16", "--dtype", "bf16"]) == 2
    assert "--dtype: given bf16 for a layer" in capsys.readouterr().err


def test_tuning_stays_within_the_repository(
    family: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = family("half").parents[1]
    outside = f"../{out.name}/half"
    with pytest.raises(SystemExit):
        main(["tune", "--out", str(out.parent / "other"), "--name", outside])
    assert "--name: given" in capsys.readouterr().err
    (tmp_path / "bad/1").mkdir(parents=True)
    for text, message in (("{", "not JSON"), ("{}", "of kind None")):
        (tmp_path / "bad/1/model.json").write_text(text)
        assert main(["tune", "--out", str(tmp_path), "--name", "bad"]) == 2
        assert message in capsys.readouterr().err


@cache
def chunked(
    mask: str, alignment: str, window: int | None, variant: str
) -> onnxruntime.InferenceSession:
    """A variant with chunks of 20."""
    config = AttentionConfig(
        2, 8, 1, 8, mask, 1.0, alignment=alignment, window=window, window_right=window, chunk=20
    )
    specs = core_specs(config, "FP32", native=True)
    assert not {"flash", "cudnn", "paged"} & set(specs)
    graph = core_graph(config, specs[variant], "FP32", 23)
    return onnxruntime.InferenceSession(graph.SerializeToString())


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 3), lengths, lengths),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.parametrize(
    ("variant", "mask", "alignment", "window"),
    [
        ("fused", "bidirectional", "bottom-right", None),
        ("blocked", "bidirectional", "bottom-right", 13),
        ("blocked", "causal", "top-left", None),
    ],
)
def test_chunks_are_what_pytorch_sees_by_an_explicit_mask(
    variant: str, mask: str, alignment: str, window: int | None, sizes: tuple, seed: int
) -> None:
    batch, sq, sk = sizes
    generator = np.random.default_rng(seed)
    shapes = {"query": (batch, 2, sq, 8), "key": (batch, 1, sk, 8), "value": (batch, 1, sk, 8)}
    feeds = {name: generator.standard_normal(s, np.float32) for name, s in shapes.items()}
    feeds["key_lengths"] = generator.integers(0, sk + 1, batch)
    (output,) = chunked(mask, alignment, window, variant).run(None, feeds)
    length = feeds["key_lengths"][:, None, None, None]
    offset = length - sq if alignment == "bottom-right" else 0
    query, key = np.arange(sq)[:, None] + offset, np.arange(sk)
    visible = (key // 20 == query // 20) & (key < length)
    if window is not None:
        visible &= key > query - window
    reach = 0 if mask == "causal" else window
    if reach is not None:
        visible &= key <= query + reach
    visible = torch.from_numpy(np.broadcast_to(visible, (batch, 2, sq, sk)).copy())
    q, k, v = (torch.from_numpy(feeds[name]).double() for name in shapes)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, visible, scale=1.0, enable_gqa=True
    )
    expected = torch.where(visible.any(dim=-1, keepdim=True), expected, 0)
    np.testing.assert_allclose(output, expected.numpy(), atol=1e-5)
