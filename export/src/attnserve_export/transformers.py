"""Hugging Face checkpoints: the BERT family, through Hugging Face's own modules."""

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnserve_export import graphs
from attnserve_export.errors import ExportError
from attnserve_export.exporting import TRACED, Description, Exported, Progress, write_version
from attnserve_export.graphs import Input
from attnserve_export.repository import AttentionInfo, Manifest, TransformerInfo, sha256
from attnserve_export.verification import Case

# Largest absolute error of hidden states and attention weights, FP32.
TOLERANCE = 1e-4

# Lengths of the sequences of each case.
_CASES: Mapping[str, tuple[int, ...]] = {
    "length 1": (1,),
    "one sequence": (24,),
    "no multiple of 8": (67,),
    "ragged": (5, 31, 1, 18),
    "two alike": (13, 13),
    "long": (128, 77),
    "as long as the model takes": (10**9,),
}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that can be exported, read."""

    folder: Path
    config: Mapping[str, Any]
    info: TransformerInfo
    num_heads: int
    head_dim: int


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's configuration.

    Raises:
        ExportError: it cannot be read, or is of a kind that is not supported; says which field of
            config.json, what it is and what is allowed.
    """
    config = _json(folder / "config.json")
    if not (folder / "model.safetensors").is_file():
        raise ExportError(f"--checkpoint: {folder}: model.safetensors is missing")
    for field, allowed, why in (
        ("model_type", ("bert",), "other families are not supported yet"),
        ("is_decoder", (False, None), "a decoder's causal mask is not supported yet"),
        ("add_cross_attention", (False, None), "cross-attention is not supported yet"),
        ("position_embedding_type", ("absolute", None), "its graph has not been verified"),
    ):
        if config.get(field) not in allowed:
            names = " or ".join(repr(value) for value in allowed if value is not None)
            raise ExportError(
                f"--checkpoint: {folder}: config.json: {field} is {config.get(field)!r}; "
                f"allowed: {names} ({why})"
            )
    pooling, normalize = _pooling(folder)
    try:
        heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
        info = TransformerInfo(
            family="bert",
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=width,
            vocab_size=int(config["vocab_size"]),
            max_seq_len=int(config["max_position_embeddings"]),
            pad_token_id=int(config.get("pad_token_id") or 0),
            pooling=pooling,
            normalize_pooled=normalize,
        )
    except KeyError as error:
        raise ExportError(f"--checkpoint: {folder}: config.json: {error} is missing") from None
    return Checkpoint(folder, config, info, heads, width // heads)


def export_transformer(
    checkpoint: Checkpoint,
    target: Path,
    *,
    name: str,
    version: int,
    opset: int,
    progress: Progress,
) -> Manifest:
    """Export a whole checkpoint, FP32.

    Args:
        checkpoint: from `read_checkpoint`.
        target: the version's folder.
        name, version: of the model.
        opset: 23 or newer.
        progress: told what is going on.

    Raises:
        VerificationError: a graph missed its tolerance; nothing is written.
    """
    progress("loading the checkpoint")
    eager = _load(checkpoint, "eager")
    info = checkpoint.info
    weights = [f"weights_{layer}" for layer in range(info.num_layers)]
    inputs = [_tokens("input_ids"), _tokens("attention_mask")]
    progress("exporting fused")
    fused = graphs.export(_Fused(_load(checkpoint, "sdpa")), inputs, ["last_hidden_state"], opset)
    progress("exporting reference")
    reference = graphs.export(_Reference(eager), inputs, ["last_hidden_state", *weights], opset)
    exact = copy.deepcopy(eager).double()

    def make(variant: str, generator: np.random.Generator) -> Iterable[Case]:
        return _cases(exact, info, generator)

    tokenizer = _tokenizer(checkpoint.folder)
    return write_version(
        Description(
            name=name,
            version=version,
            kind="transformer",
            dtype="FP32",
            attention=AttentionInfo(
                num_heads=checkpoint.num_heads,
                num_kv_heads=checkpoint.num_heads,
                head_dim=checkpoint.head_dim,
                value_head_dim=checkpoint.head_dim,
                mask="bidirectional",
                window=None,
                window_right=None,
                alignment="top-left",
                alibi=False,
                rotary=None,
                scale=checkpoint.head_dim**-0.5,
                softcap=0.0,
            ),
            source={
                "description": f"checkpoint {checkpoint.config.get('_name_or_path') or 'bert'}",
                "sha256": sha256(checkpoint.folder / "model.safetensors"),
            },
            transformer=info,
            tokenizer=None if tokenizer is None else "tokenizer.json",
        ),
        {"fused": Exported(fused), "reference": Exported(reference)},
        target,
        cases=make,
        reference="Hugging Face transformers, eager attention, float64",
        extra_files={} if tokenizer is None else {"tokenizer.json": tokenizer},
        progress=progress,
    )


class _Fused(nn.Module):
    """Token ids to hidden states, over scaled_dot_product_attention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # A mask of four dimensions is taken as it is. It is written out over the queries since
        # ONNX Runtime's Attention does not broadcast that dimension.
        seq_len = input_ids.shape[1]
        visible = (attention_mask > 0)[:, None, None, :].expand(-1, 1, seq_len, -1)
        states: Tensor = self.model(input_ids=input_ids, attention_mask=visible).last_hidden_state
        return states


class _Reference(nn.Module):
    """Token ids to hidden states and the attention weights of every layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        lowest = torch.finfo(torch.float32).min
        additive = torch.where(attention_mask > 0, 0.0, lowest)[:, None, None, :]
        result = self.model(input_ids=input_ids, attention_mask=additive, output_attentions=True)
        return (result.last_hidden_state, *result.attentions)


def _load(checkpoint: Checkpoint, attention: str) -> nn.Module:
    # Imported here: core and layer exports do without transformers.
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        raise ExportError(
            "transformers is not installed; `pip install 'attnserve-export[transformers]'`"
        ) from None
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = BertConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    model = BertModel.from_pretrained(
        checkpoint.folder,
        config=config,
        add_pooling_layer=False,
        attn_implementation=attention,
        local_files_only=True,
        dtype=torch.float32,
    )
    module: nn.Module = model.eval()  # type: ignore[no-untyped-call]
    return module


def _tokens(name: str) -> Input:
    shape = (TRACED["batch"], TRACED["seq_len"])
    return Input(name, torch.ones(shape, dtype=torch.int64), ("batch", "seq_len"))


def _cases(
    exact: nn.Module, info: TransformerInfo, generator: np.random.Generator
) -> Iterable[Case]:
    """Ragged batches of random ids through transformers itself, in float64."""
    for name, wanted in _CASES.items():
        lengths = [min(length, info.max_seq_len) for length in wanted]
        longest = max(lengths)
        input_ids = generator.integers(0, info.vocab_size, (len(lengths), longest))
        attention_mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
        with torch.no_grad():
            result = exact(
                input_ids=torch.from_numpy(input_ids),
                attention_mask=torch.from_numpy(attention_mask),
                output_attentions=True,
            )
        expected = {"last_hidden_state": result.last_hidden_state.numpy()}
        # What padding itself attends to means nothing.
        valid = attention_mask[:, :, None].astype(bool)
        compared = {"last_hidden_state": valid}
        for layer, weights in enumerate(result.attentions):
            expected[f"weights_{layer}"] = weights.numpy()
            compared[f"weights_{layer}"] = valid[:, None]
        yield Case(
            name,
            {"batch": len(lengths), "seq_len": longest},
            {"input_ids": input_ids, "attention_mask": attention_mask},
            expected,
            TOLERANCE,
            compared,
        )


def _pooling(folder: Path) -> tuple[str | None, bool]:
    """How a sentence-transformers folder makes one vector of a sequence, and if it normalises."""
    if not (folder / "modules.json").is_file():
        return None, False
    modules = _json(folder / "modules.json")
    normalize = any(str(module.get("type", "")).endswith("Normalize") for module in modules)
    for module in modules:
        path = folder / str(module.get("path", "")) / "config.json"
        if not str(module.get("type", "")).endswith("Pooling") or not path.is_file():
            continue
        config = _json(path)
        if config.get("pooling_mode_mean_tokens"):
            return "mean", normalize
        if config.get("pooling_mode_cls_token"):
            return "cls", normalize
    return None, normalize


def _tokenizer(folder: Path) -> bytes | None:
    """tokenizer.json without truncation and padding, which are the server's to decide."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = _json(path)
    content["truncation"] = content["padding"] = None
    return json.dumps(content, ensure_ascii=False).encode()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"--checkpoint: {path}: {error.strerror}") from None
    except ValueError as error:
        raise ExportError(f"--checkpoint: {path}: not JSON: {error}") from None
