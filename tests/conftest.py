"""Small random checkpoints of every family, and a server that has one of each."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors

VOCABULARY, POSITIONS = 60, 48

# Without these, whose code differs from another's by little; `-m slow` has them all.
QUICK = ("roberta", "gpt2", "qwen2", "gpt_oss", "t5", "bart")


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


def gpt_oss(s: Shape) -> dict[str, Any]:
    """Sinks, experts, and a window in every other layer."""
    return llama(s) | {
        "sliding_window": s.window,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }


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
    "gpt_oss": gpt_oss,
    "t5": t5,
    "bart": bart,
}


def write_checkpoint(family: str, shape: Shape, folder: Path) -> None:
    """A random checkpoint, with parameters larger than those that training starts from."""
    torch.manual_seed(shape.seed)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCABULARY, **CONFIGS[family](shape)
    )
    model = transformers.AutoModel.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" not in name.lower() and "ln_" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., None]:
    """Makes a checkpoint: family, folder, and attributes of `Shape`."""

    def make(family: str, folder: Path, **shape: Any) -> None:
        write_checkpoint(family, Shape(**shape), folder)

    return make


@pytest.fixture(scope="session")
def serving() -> Callable[[Path], contextlib.AbstractContextManager[str]]:
    """A server over a repository for the length of a `with` block; gives its address."""

    @contextlib.contextmanager
    def serve(repository: Path) -> Iterator[str]:
        settings = Settings(repository, port=0, metrics_port=0, provider="cpu", drain_seconds=5)
        server = AttentionServer(settings)
        server.start()
        yield f"127.0.0.1:{server.port}"
        server.drain()

    return serve


@pytest.fixture(scope="session")
def families(
    tmp_path_factory: pytest.TempPathFactory,
    export_all: Callable[[list[list[str]]], None],
    make_checkpoint: Callable[..., None],
    serving: Callable[[Path], contextlib.AbstractContextManager[str]],
) -> Iterator[tuple[Path, str]]:
    """A folder with a checkpoint of each quick family, and the address of a server with them."""
    folder = tmp_path_factory.mktemp("families")
    commands = []
    for family in QUICK:
        # Only these have layers that differ among each other.
        layers = 2 if family in ("qwen2", "gpt_oss") else 1
        make_checkpoint(family, folder / family, layers=(layers, 1))
        commands.append(["transformer", "--out", str(folder / "models"), "--name", family])
        commands[-1] += ["--checkpoint", str(folder / family)]
    export_all(commands)
    with serving(folder / "models") as address:
        yield folder, address
