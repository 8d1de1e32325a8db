"""Windows, positions, BF16, diagnostics of long inputs, and picks, through the wire."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attnserve_kernels
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
from attnserve_client import AttentionClient, FailedPreconditionError, ResourceExhaustedError
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.attention.positions import Rotary
from attnserve_export.models import seeded
from attnserve_export.reference import CAUSAL, Scheme, attention_reference, diagnostics_reference
from attnserve_server.app import AttentionServer
from attnserve_server.settings import MIB, Limits, Settings
from handmade import attention, write_core, write_layer

HEADS, DIM = 4, 8
pytestmark = pytest.mark.needs_library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("family")

    def write(name: str, dtype: str = "FP32", **options: Any) -> None:
        write_core(made, name, attention(HEADS, DIM, mask="causal", **options), dtype=dtype)

    write("causal")
    write("window", window=16)
    write("bottom", alignment="bottom-right")
    write("brain", dtype="BF16")
    write("alibi", alibi=True)
    turned = attention(4, 8, mask="causal", rotary=Rotary("half", 8))
    write_layer(made, "layer", seeded(AttentionLayer, LayerConfig(turned, 32, None), 3))
    return made


def start(folder: Path) -> AttentionServer:
    # Far less than the scores of the long requests below would take.
    limits = Limits(max_working_bytes=192 * MIB)
    server = AttentionServer(
        Settings(folder, port=0, metrics_port=None, provider="cpu", drain_seconds=5, limits=limits)
    )
    server.start()
    return server


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    server = start(folder)
    yield f"127.0.0.1:{server.port}"
    server.drain()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[AttentionClient]:
    with AttentionClient(address) as opened:
        yield opened


def tensors(length: int, seed: int, batch: int = 1) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(seed)
    shape = (batch, HEADS, length, DIM)
    return tuple(generator.standard_normal(shape, np.float32) for _ in range(3))


SCHEMES = {
    "causal": CAUSAL,
    "window": Scheme(left=15, right=0),
    "bottom": Scheme(right=0, bottom_right=True),
    "alibi": Scheme(right=0, slopes=[2.0 ** (-2 * (i + 1)) for i in range(HEADS)]),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_output_and_diagnostics_agree_with_the_reference(
    client: AttentionClient, name: str
) -> None:
    q, k, v = tensors(50, 1, batch=2)
    q = q[:, :, :33]
    lengths = np.array([50, 21])
    asked = {"return_entropy": True, "top_k": 3, "return_mass_per_key": True}
    result = client.attend(q, k, v, model=name, key_lengths=lengths, mass_by_distance=9, **asked)
    output, weights = attention_reference(q, k, v, key_lengths=lengths, scheme=SCHEMES[name])
    expected = diagnostics_reference(
        weights, lengths, bottom_right=SCHEMES[name].bottom_right, top_k=3, distances=9
    )
    assert result.variant == "native"
    assert result.weights is None
    np.testing.assert_allclose(result.output, output, atol=2e-5)
    np.testing.assert_allclose(result.entropy, expected["entropy"], atol=1e-4)
    np.testing.assert_allclose(result.mass_per_key, expected["mass_per_key"], atol=1e-4)
    np.testing.assert_allclose(result.mass_by_distance, expected["mass_by_distance"], atol=1e-4)
    np.testing.assert_allclose(result.top_k_weights, expected["top_k_weights"], atol=1e-5)
    # The same from the weights, where these are asked for too.
    both = client.attend(
        q, k, v, model=name, key_lengths=lengths, mass_by_distance=9, return_weights=True, **asked
    )
    assert both.variant == "reference"
    for field in ("entropy", "mass_per_key", "mass_by_distance", "top_k_weights"):
        np.testing.assert_allclose(getattr(both, field), getattr(result, field), atol=1e-4)


def test_bfloat16_goes_in_and_out(client: AttentionClient) -> None:
    q, k, v = (array.astype(ml_dtypes.bfloat16) for array in tensors(40, 2))
    for variant in ("", "fused", "blocked", "reference"):
        result = client.attend(q, k, v, model="brain", variant=variant, top_k=2)
        assert result.output.dtype == ml_dtypes.bfloat16
        output, weights = attention_reference(q, k, v, scheme=CAUSAL)
        np.testing.assert_allclose(result.output.astype(np.float64), output, atol=1.6e-2)
        np.testing.assert_allclose(result.top_k_weights[..., 0], weights.max(-1), atol=1e-2)


def test_bfloat16_goes_in_and_out_by_the_open_inference_protocol(address: str) -> None:
    arrays = [array.astype(ml_dtypes.bfloat16) for array in tensors(33, 3)]
    inputs = []
    for name, array in zip(("query", "key", "value"), arrays, strict=True):
        inputs.append(triton.InferInput(name, array.shape, "BF16"))
        inputs[-1].set_data_from_numpy(array)
    with triton.InferenceServerClient(address) as opened:
        assert opened.get_model_metadata("brain").inputs[0].datatype == "BF16"
        output = opened.infer("brain", inputs).as_numpy("output")
    expected, _ = attention_reference(*(a.astype(np.float32) for a in arrays), scheme=CAUSAL)
    assert output.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(output.astype(np.float32), expected, atol=2e-2)


def test_a_long_request_is_diagnosed_without_its_weights(client: AttentionClient) -> None:
    """16,384 positions: the weights of 4 heads would take 4 GiB."""
    q, k, v = tensors(16_384, 3)
    result = client.attend(
        q, k, v, model="window", return_entropy=True, top_k=1, return_mass_per_key=True,
        mass_by_distance=20,
    )  # fmt: skip
    # The last 100 queries by the reference, over the keys that they see.
    near = slice(-200, None)
    output, weights = attention_reference(
        q[:, :, near], k[:, :, near], v[:, :, near], scheme=SCHEMES["window"]
    )
    logs = np.log(np.where(weights > 0, weights, 1))
    last = slice(-100, None)
    np.testing.assert_allclose(result.output[:, :, last], output[:, :, last], atol=1e-5)
    entropy = -(weights * logs).sum(-1)
    np.testing.assert_allclose(result.entropy[:, :, last], entropy[:, :, last], atol=1e-5)
    for mass in (result.mass_per_key, result.mass_by_distance):
        np.testing.assert_allclose(mass.sum(-1), 16_384, rtol=1e-5)
    assert not result.mass_by_distance[..., 16:].any()
    with pytest.raises(ResourceExhaustedError, match="variant 'fused'"):
        client.attend(q, k, v, model="window", variant="fused")


def test_a_layer_is_diagnosed_too(client: AttentionClient) -> None:
    hidden = np.random.default_rng(4).standard_normal((2, 30, 32)).astype(np.float32)
    asked = {"return_entropy": True, "mass_by_distance": 4, "model": "layer"}
    result = client.attend(hidden_states=hidden, **asked)
    both = client.attend(hidden_states=hidden, return_weights=True, **asked)
    assert (result.variant, both.variant) == ("native", "reference")
    np.testing.assert_allclose(result.output, both.output, atol=1e-5)
    np.testing.assert_allclose(result.entropy, both.entropy, atol=1e-4)
    np.testing.assert_allclose(result.mass_by_distance, both.mass_by_distance, atol=1e-3)


def test_diagnostics_alone(client: AttentionClient) -> None:
    q, k, v = tensors(12, 5)
    result = client.attend(q, k, v, model="causal", return_output=False, return_entropy=True)
    assert (result.output, result.variant) == (None, "diagnostics")
    assert result.entropy[0, 0, 0] == 0
    with pytest.raises(FailedPreconditionError, match="it gives no"):
        client.attend(
            q, k, v, model="causal", return_output=False, return_entropy=True, variant="native"
        )
    forced = client.attend(q, k, v, model="causal", return_entropy=True, variant="reference")
    assert forced.variant == "reference"
    np.testing.assert_allclose(forced.entropy, result.entropy, atol=1e-5)


def test_a_variant_can_be_forced(client: AttentionClient) -> None:
    q, k, v = tensors(70, 6)
    output, _ = attention_reference(q, k, v, scheme=SCHEMES["window"])
    for variant in ("native", "blocked", "fused", "reference"):
        result = client.attend(q, k, v, model="window", variant=variant)
        assert result.variant == variant
        np.testing.assert_allclose(result.output, output, atol=2e-5)


def test_the_manifests_picks_decide(folder: Path) -> None:
    manifest = folder / "causal/1/model.json"
    before = manifest.read_text()
    content = json.loads(before)
    content["picks"]["CPUExecutionProvider"] = [
        {"up_to": 10, "variants": ["fused", "native"]},
        {"up_to": None, "variants": ["reference"]},
    ]
    manifest.write_text(json.dumps(content))
    server = start(folder)
    try:
        with AttentionClient(f"127.0.0.1:{server.port}") as client:
            for length, variant in ((10, "fused"), (11, "reference")):
                result = client.attend(*tensors(length, 7), model="causal")
                assert result.variant == variant
            # The picked one cannot do it, the next can.
            bias = np.zeros((1, 1, 1, 1), np.float32)
            assert client.attend(*tensors(9, 7), model="causal", bias=bias).variant == "native"
    finally:
        server.drain()
        manifest.write_text(before)


def test_without_the_operators_the_other_variants_serve(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attnserve_kernels, "library_path", lambda: None)
    server = start(folder)
    names = {variant.name for variant in server.store.get("alibi", "").variants}
    assert names == {"blocked", "blocked_sinks", "reference", "reference_sinks", "softcap"}
    try:
        with AttentionClient(f"127.0.0.1:{server.port}") as client:
            q, k, v = tensors(60, 8)
            result = client.attend(q, k, v, model="window", mass_by_distance=3, top_k=1)
            output, weights = attention_reference(q, k, v, scheme=SCHEMES["window"])
            assert result.variant == "reference"
            np.testing.assert_allclose(result.output, output, atol=1e-5)
            np.testing.assert_allclose(result.top_k_weights[..., 0], weights.max(-1), atol=1e-5)
            assert client.attend(q, k, v, model="alibi").variant == "blocked"
    finally:
        server.drain()


def test_a_models_description_says_who_sees_whom(client: AttentionClient) -> None:
    described = {model.name: model for model in client.list_models()}
    assert described["window"].window == 16
    assert described["window"].window_right is None
    assert described["bottom"].bottom_right
    assert described["alibi"].alibi
    assert described["layer"].rotary == "half"
    assert described["brain"].dtype == "BF16"
    quadratic = {v.name for v in described["causal"].variants if v.quadratic_memory}
    assert quadratic == {"fused", "packed_weights", "reference", "reference_sinks", "softcap"}
