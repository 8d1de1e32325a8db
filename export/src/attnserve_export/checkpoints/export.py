"""A checkpoint to a version in the model repository."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import attnserve_kernels
import numpy as np
import onnx
import torch
from attnserve_proto.manifest import (
    Attention,
    Manifest,
    Transformer,
    TransformerAttention,
    TransformerLayer,
)

from attnserve_export import graphs
from attnserve_export.checkpoints.cases import transformer_cases
from attnserve_export.checkpoints.checkpoint import (
    Checkpoint,
    load_model,
    tokenizer_json,
    weights_sha256,
)
from attnserve_export.checkpoints.families import DECODER, ENCODER, ENCODER_DECODER
from attnserve_export.checkpoints.modules import ENCODER_HIDDEN, HIDDEN, TARGET, module_for
from attnserve_export.checkpoints.tracing import ATTENTIONS, CROSS, IMPLEMENTATION, Call, Tracer
from attnserve_export.exporting import TRACED, Description, Exported, Progress, write_version
from attnserve_export.graphs import Input
from attnserve_export.runtime import CPU
from attnserve_export.verification import Case

SEQ_LEN, TARGET_LEN = "seq_len", "target_len"

# On CPUs, with the additions before them.
_SLOW_WHEN_FUSED = ("LayerNormalization", "Gelu")

_MASKS = {ENCODER: "bidirectional", DECODER: "causal", CROSS: "cross"}


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
        ExportError: the parameters do not fit the configuration.
        VerificationError: a graph missed its tolerance; nothing is written.
    """
    progress("loading the checkpoint")
    model = load_model(checkpoint, IMPLEMENTATION)
    kind = checkpoint.family.kind
    names, info = _observed(checkpoint, Tracer(model, kind, native=False))
    progress("exporting fused")
    variants = {"fused": Exported(_graph(Tracer(model, kind, native=False), names, opset))}
    if attnserve_kernels.library_path() is None:
        progress("attnserve-kernels has no library here: variant native is left out")
    else:
        progress("exporting native")
        # A bias is a matrix over all queries and keys.
        linear = not any(attention.position_bias for attention in info.attentions)
        graph = _graph(Tracer(model, kind, native=True), names, opset)
        graphs.keep_apart(graph, _SLOW_WHEN_FUSED)
        variants["native"] = Exported(
            graph,
            memory="linear" if linear else "quadratic",
            providers=(CPU,),
            native=True,
        )
    exact = load_model(checkpoint, "eager").double()

    made: list[Case] = []

    def make(variant: str, generator: np.random.Generator) -> Iterable[Case]:
        if not made:  # all variants meet the same cases, which take longer to make than to meet
            made.extend(transformer_cases(exact, checkpoint, info, generator))
        return made

    tokenizer = tokenizer_json(checkpoint.folder)
    if tokenizer is None:
        progress("tokenizer.json is not there: the model will take ids, but no texts")
    return write_version(
        Description(
            name=name,
            version=version,
            kind="transformer",
            dtype="FP32",
            attention=_attention_info(info.attentions[0]),
            source={
                "description": f"checkpoint {checkpoint.name}",
                "sha256": weights_sha256(checkpoint.folder),
            },
            transformer=info,
            tokenizer=None if tokenizer is None else "tokenizer.json",
        ),
        variants,
        target,
        cases=make,
        reference="Hugging Face transformers, eager attention, float64",
        extra_files={} if tokenizer is None else {"tokenizer.json": tokenizer},
        progress=progress,
    )


def _observed(checkpoint: Checkpoint, tracer: Tracer) -> tuple[list[str], Transformer]:
    """What a small run in PyTorch tells: the names of all outputs, and the manifest's part."""
    module = module_for(tracer)
    with torch.no_grad():
        module(*(_tokens(name).example for name in module.inputs))
    config = checkpoint.config
    info = Transformer(
        family=checkpoint.family.name,
        num_layers=len(tracer.calls[ATTENTIONS[tracer.kind][0]]),
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_seq_len=checkpoint.max_seq_len,
        pad_token_id=checkpoint.pad_token_id,
        pooling=checkpoint.pooling,
        normalize_pooled=checkpoint.normalize_pooled,
        decoder_start_token_id=checkpoint.decoder_start_token_id,
        attentions=tuple(_described(name, calls) for name, calls in tracer.calls.items()),
    )
    return [*module.hidden, *tracer.outputs()], info


def _described(name: str, calls: Sequence[Call]) -> TransformerAttention:
    _, num_heads, _, head_dim = calls[0].query.shape
    return TransformerAttention(
        name=name,
        num_heads=num_heads,
        num_kv_heads=calls[0].key.shape[1],
        head_dim=head_dim,
        mask=_MASKS[name],
        position_bias=calls[0].bias is not None,
        layers=tuple(TransformerLayer(call.scale, call.window) for call in calls),
    )


def _graph(tracer: Tracer, names: Sequence[str], opset: int) -> onnx.ModelProto:
    module = module_for(tracer)
    model = graphs.export(module, [_tokens(name) for name in module.inputs], names, opset)
    graphs.rename_dims(model, {name: _dims(name, tracer.kind) for name in names})
    return model


def _tokens(name: str) -> Input:
    dims = ("batch", TARGET_LEN if name in TARGET else SEQ_LEN)
    return Input(name, torch.ones([TRACED[dim] for dim in dims], dtype=torch.int64), dims)


def _dims(output: str, kind: str) -> dict[int, str]:
    """The dynamic dimensions of an output."""
    own = TARGET_LEN if kind == ENCODER_DECODER else SEQ_LEN
    if output in (HIDDEN, ENCODER_HIDDEN):
        return {0: "batch", 1: own if output == HIDDEN else SEQ_LEN}
    attention, _, rest = output.partition("_")
    if rest == "position_bias":
        return {1: f"{attention}_distances"}
    of_source = attention == ENCODER or (attention == CROSS and rest.startswith("key"))
    return {0: "batch", 2: SEQ_LEN if of_source else own}


def _attention_info(attention: TransformerAttention) -> Attention:
    """The attention of a transformer's main stack, as every model describes one."""
    windows = {layer.window for layer in attention.layers}
    return Attention(
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        value_head_dim=attention.head_dim,
        mask=attention.mask,
        window=windows.pop() if len(windows) == 1 else None,
        window_right=None,
        alignment="top-left",
        alibi=False,
        rotary=None,
        scale=attention.layers[0].scale,
        softcap=0.0,
    )
