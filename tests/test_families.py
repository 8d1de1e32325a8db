"""Every family of checkpoints, from random configurations: exported, served, asked over gRPC, and
compared with Hugging Face transformers, eager, on the same padded batch."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from attnserve_client import AttentionClient, TokensResult
from attnserve_export.checkpoints.families import ENCODER_DECODER, FAMILIES
from attnserve_export.cli import main
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Settings
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

LENGTHS, TARGET_LENGTHS = (5, 31, 1, 18), (9, 2, 27, 1)
VOCABULARY, POSITIONS = 60, 48


@dataclass(frozen=True)
class Shape:
    """A configuration of any family; each takes of it what it has.

    Attributes:
        layers: of the first stack, and of an encoder-decoder's decoder.
        sharing: query heads to a key head.
        window: keys that a query sees.
        rope: kind of rotary embedding.
        odd: whether to take a family's other choices (activations, norms, biases, scales).
    """

    layers: tuple[int, int] = (2, 1)
    heads: int = 4
    sharing: int = 2
    head_dim: int = 6
    window: int = 7
    rope: str = "llama3"
    odd: bool = True
    seed: int = 0


SHAPES = st.builds(
    Shape,
    layers=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    heads=st.sampled_from((2, 4, 6)),
    sharing=st.sampled_from((1, 2)),
    head_dim=st.sampled_from((2, 6, 8, 16)),
    window=st.integers(1, 40),
    rope=st.sampled_from(("default", "linear", "llama3", "yarn")),
    odd=st.booleans(),
    seed=st.integers(0, 2**31),
)


def bert(s: Shape) -> dict[str, Any]:
    return {
        "hidden_size": s.heads * s.head_dim,
        "num_hidden_layers": s.layers[0],
        "num_attention_heads": s.heads,
        "intermediate_size": 20,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "relu" if s.odd else "gelu",
        "pad_token_id": 1,
    }


def distilbert(s: Shape) -> dict[str, Any]:
    return {
        "dim": s.heads * s.head_dim,
        "n_layers": s.layers[0],
        "n_heads": s.heads,
        "hidden_dim": 20,
        "max_position_embeddings": POSITIONS,
        "activation": "relu" if s.odd else "gelu",
    }


def gpt2(s: Shape) -> dict[str, Any]:
    return {
        "n_embd": s.heads * s.head_dim,
        "n_layer": s.layers[0],
        "n_head": s.heads,
        "n_positions": POSITIONS,
        "scale_attn_by_inverse_layer_idx": s.odd,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def llama(s: Shape) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": s.rope, "rope_theta": 10_000.0}
    if s.rope != "default":
        rope["factor"] = 4.0
    if s.rope in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = 16
    if s.rope == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "hidden_size": 24,
        "num_hidden_layers": s.layers[0],
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.heads // s.sharing,
        "head_dim": s.head_dim,
        "intermediate_size": 20,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": rope,
        "attention_bias": s.odd,
        "mlp_bias": s.odd,
    }


def mistral(s: Shape) -> dict[str, Any]:
    return llama(s) | {"sliding_window": None if s.odd else s.window}


def qwen(s: Shape) -> dict[str, Any]:
    # Layers from max_window_layers on have the window: some have it and some have not.
    window = {"use_sliding_window": True, "sliding_window": s.window, "max_window_layers": 1}
    return llama(s) | window


def qwen2(s: Shape) -> dict[str, Any]:
    return qwen(s) | {"hidden_size": s.heads * s.head_dim}


def t5(s: Shape) -> dict[str, Any]:
    return {
        "d_model": 24,
        "d_kv": s.head_dim,
        "d_ff": 20,
        "num_layers": s.layers[0],
        "num_decoder_layers": s.layers[1],
        "num_heads": s.heads,
        "relative_attention_num_buckets": 8 if s.odd else 32,
        "relative_attention_max_distance": 20,
        "feed_forward_proj": "gated-gelu" if s.odd else "relu",
        "decoder_start_token_id": 0,
    }


def bart(s: Shape) -> dict[str, Any]:
    return {
        "d_model": s.heads * s.head_dim,
        "encoder_layers": s.layers[0],
        "decoder_layers": s.layers[1],
        "encoder_attention_heads": s.heads,
        "decoder_attention_heads": 2 if s.odd else s.heads,
        "encoder_ffn_dim": 20,
        "decoder_ffn_dim": 12,
        "max_position_embeddings": POSITIONS,
        "scale_embedding": s.odd,
    }


CONFIGS: Mapping[str, Callable[[Shape], dict[str, Any]]] = {
    "bert": bert,
    "roberta": bert,
    "xlm-roberta": bert,
    "distilbert": distilbert,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen,
    "t5": t5,
    "bart": bart,
}

# In the quick run; the other families differ from one of these by little.
QUICK = ("roberta", "gpt2", "qwen2", "llama", "t5", "bart")


def test_every_family_has_configurations() -> None:
    assert set(CONFIGS) == set(FAMILIES)


def make_checkpoint(family: str, shape: Shape, folder: Path) -> None:
    """A random checkpoint, with parameters larger than those that training starts from."""
    torch.manual_seed(shape.seed)
    model_class = getattr(transformers, FAMILIES[family].model_class)
    model = model_class(model_class.config_class(vocab_size=VOCABULARY, **CONFIGS[family](shape)))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" not in name.lower() and "ln_" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def quick(
    tmp_path_factory: pytest.TempPathFactory, export_all: Callable[[list[list[str]]], None]
) -> Iterator[tuple[Path, AttentionClient]]:
    """One checkpoint a family, and a client of a server that has them all."""
    folder = tmp_path_factory.mktemp("families")
    commands = []
    for family in QUICK:
        # Only Qwen's layers differ among each other.
        layers = (2, 1) if family == "qwen2" else (1, 1)
        make_checkpoint(family, Shape(layers=layers), folder / family)
        commands.append(["transformer", "--out", str(folder / "models"), "--name", family])
        commands[-1] += ["--checkpoint", str(folder / family)]
    export_all(commands)
    with serving(folder / "models") as client:
        yield folder, client


class serving:  # noqa: N801 (used as a function is)
    """A server over a repository for the length of a `with` block; gives a client of it."""

    def __init__(self, repository: Path) -> None:
        settings = Settings(repository, port=0, metrics_port=0, provider="cpu", drain_seconds=5)
        self.server = AttentionServer(settings)

    def __enter__(self) -> AttentionClient:
        self.server.start()
        self.client = AttentionClient(f"127.0.0.1:{self.server.port}")
        return self.client

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.drain()


@pytest.mark.parametrize("family", QUICK)
def test_hidden_states_and_every_map_are_those_of_transformers(
    family: str, quick: tuple[Path, AttentionClient]
) -> None:
    folder, client = quick
    compare(family, folder / family, client, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_any_configuration_of_a_family(family: str) -> None:
    @settings(
        max_examples=5,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(shape=SHAPES)
    def check(shape: Shape) -> None:
        if CONFIGS[family] is qwen2 and shape.head_dim * shape.heads < 8:
            shape = replace(shape, head_dim=8)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_checkpoint(family, shape, folder / "checkpoint")
            arguments = ["transformer", "--out", str(folder / "models"), "--name", "drawn"]
            assert main([*arguments, "--checkpoint", str(folder / "checkpoint")]) == 0
            with serving(folder / "models") as client:
                compare("drawn", folder / "checkpoint", client, family)

    check()


def compare(model: str, checkpoint: Path, client: AttentionClient, family: str) -> None:
    """A ragged batch through all variants of a model, and through transformers with padding."""
    sequences = random_ids(LENGTHS, 0)
    targets = random_ids(TARGET_LENGTHS, 1) if FAMILIES[family].kind == ENCODER_DECODER else None
    eager = load(family, checkpoint)
    expected = eager_outputs(eager, sequences, targets)
    described = next(entry for entry in client.list_models() if entry.name == model)
    assert {variant.name for variant in described.variants} >= {"fused"}
    for variant in described.variants:
        for attention in described.attentions:
            result = client.attend_tokens(
                sequences,
                model=model,
                variant=variant.name,
                targets=targets,
                attention=attention.name,
                return_weights=True,
                return_entropy=True,
                return_effective_context=True,
                mass_by_distance=6,
                mass_on_first=2,
            )
            assert result.variant == variant.name
            check_hidden(result, expected)
            maps = expected[maps_name(attention.name, targets is not None)]
            assert attention.num_layers == len(maps)
            check_attention(result, maps)


def random_ids(lengths: Sequence[int], seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    # Not the token that pads: RoBERTa gives it no position.
    return [generator.integers(2, VOCABULARY, length).tolist() for length in lengths]


def load(family: str, checkpoint: Path) -> Any:
    model_class = getattr(transformers, FAMILIES[family].model_class)
    return model_class.from_pretrained(checkpoint, attn_implementation="eager").eval()


def eager_outputs(
    model: Any, sequences: list[list[int]], targets: list[list[int]] | None
) -> dict[str, Any]:
    """What transformers gives, by its own names, with its own masks."""
    feeds = {}
    for prefix, batch in (("", sequences), ("decoder_", targets)):
        if batch is not None:
            longest = max(map(len, batch))
            rows = [ids + [1] * (longest - len(ids)) for ids in batch]
            mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch]
            feeds |= {f"{prefix}input_ids": rows, f"{prefix}attention_mask": mask}
    with torch.no_grad():
        return model(
            **{name: torch.tensor(rows) for name, rows in feeds.items()}, output_attentions=True
        )


def maps_name(attention: str, two_stacks: bool) -> str:
    return f"{attention}_attentions" if two_stacks else "attentions"


def check_hidden(result: TokensResult, expected: Any) -> None:
    for row, hidden in enumerate(result.hidden):
        states = expected.last_hidden_state[row, : len(hidden)]
        np.testing.assert_allclose(hidden, states, atol=1e-4)
    for row, hidden in enumerate(result.encoder_hidden or []):
        states = expected.encoder_last_hidden_state[row, : len(hidden)]
        np.testing.assert_allclose(hidden, states, atol=1e-4)
    assert (result.encoder_hidden is None) == ("encoder_last_hidden_state" not in expected)


def check_attention(result: TokensResult, maps: Sequence[torch.Tensor]) -> None:
    for row, weights in enumerate(result.weights):
        query_len, key_len = weights.shape[2:]
        exact = torch.stack(list(maps))[:, row, :, :query_len, :key_len].numpy()
        np.testing.assert_allclose(weights, exact, atol=1e-4)
        logs = np.log(exact, out=np.zeros_like(exact), where=exact > 0)
        entropy = -(exact * logs).sum(axis=-1)
        np.testing.assert_allclose(result.entropy[row], entropy, atol=1e-4)
        np.testing.assert_allclose(result.effective_context[row], np.exp(entropy), rtol=1e-3)
        first = exact[..., :2].sum(axis=-1)
        np.testing.assert_allclose(result.mass_on_first[row], first, atol=1e-4)
        apart = np.abs(np.arange(key_len) - np.arange(query_len)[:, None])
        bins = [(exact * (np.minimum(apart, 5) == n)).sum(axis=(-1, -2)) for n in range(6)]
        np.testing.assert_allclose(
            result.mass_by_distance[row], np.stack(bins, axis=-1), atol=1e-4 * query_len
        )
