"""A checkpoint to a version in the model repository."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from numpy.typing import NDArray
from torch import Tensor, nn

from attnserve_export import apart, graphs
from attnserve_export.attention.flash import OPSET as LENGTHS_OPSET
from attnserve_export.checkpoints import parameters
from attnserve_export.checkpoints.cases import Exact, first_case, transformer_cases
from attnserve_export.checkpoints.checkpoint import (
    Checkpoint,
    load_model,
    weights_sha256,
)
from attnserve_export.checkpoints.modules import (
    ENCODER_HIDDEN,
    HIDDEN,
    PREFIX,
    SOURCE,
    TARGET,
    TYPES,
    module_for,
)
from attnserve_export.checkpoints.observing import observe
from attnserve_export.checkpoints.plans import CROSS, DECODER, ENCODER, ENCODER_DECODER
from attnserve_export.checkpoints.texts import FILE as TOKENIZER
from attnserve_export.checkpoints.texts import TextError, TextReader, text_reader
from attnserve_export.checkpoints.tracing import IMPLEMENTATION, Call, Tracer
from attnserve_export.errors import ExportError
from attnserve_export.exporting import TRACED, Description, Exported, Progress, write_version
from attnserve_export.graphs import Graph, Input
from attnserve_export.runtime import CPU, CUDA
from attnserve_export.verification import Case, errors_of

Array = NDArray[Any]

SEQ_LEN, TARGET_LEN = "seq_len", "target_len"

# On CPUs, with the additions before them.
_SLOW_WHEN_FUSED = ("LayerNormalization", "Gelu")

# Largest absolute error in PyTorch of what is then exported; of a graph, less is allowed.
ADMITTED = 1e-3

# Parameters from which on a model has them in memory only once while it is exported.
LARGE = 1 << 25

TORCH = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
ONNX = {
    "FP32": onnx.TensorProto.FLOAT,
    "FP16": onnx.TensorProto.FLOAT16,
    "BF16": onnx.TensorProto.BFLOAT16,
}

_MASKS = {ENCODER: "bidirectional", DECODER: "causal", CROSS: "cross"}


def export_transformer(
    checkpoint: Checkpoint,
    target: Path,
    *,
    name: str,
    version: int,
    opset: int,
    dtype: str = "FP32",
    native: bool = True,
    large: bool | None = None,
    progress: Progress,
) -> Manifest:
    """Export a whole checkpoint.

    Args:
        checkpoint: from `read_checkpoint`.
        target: the version's folder.
        name, version: of the model.
        opset: 23 or newer.
        dtype: "FP32", "FP16" or "BF16": of parameters as they are stored, and of hidden states.
        native: whether to make the variant that needs the operators of attnserve-kernels.
        large: whether to have its parameters in memory only once; None: from `LARGE` on.
        progress: told what is going on.

    Raises:
        ExportError: the parameters do not fit the configuration.
        VerificationError: a graph missed its tolerance; nothing is written.
    """
    progress("loading the checkpoint")
    reader = _reader(checkpoint, progress)
    model = load_model(checkpoint, IMPLEMENTATION, TORCH[dtype])
    large = parameters.count_of(model) >= LARGE if large is None else large
    progress("comparing its modules with transformers")
    exact = _admitted(checkpoint, model, dtype, large=large)
    plan = exact.plan
    computing = model if dtype == "FP32" else parameters.in_fp32(model, values=False)
    stored = {f"{PREFIX}{name}": tensor for name, tensor in parameters.stored(model).items()}

    def exported(tracer: Tracer) -> Graph:
        graph = _graph(tracer, opset, stored)
        graphs.cast_outputs(graph, (HIDDEN, ENCODER_HIDDEN), ONNX[dtype])
        if tracer.native:
            graphs.keep_apart(graph, _SLOW_WHEN_FUSED)
        return apart.bind(graph, stored, late=large)

    progress("exporting fused")
    variants = {"fused": Exported(exported(Tracer(computing, plan)))}
    if not native:
        progress("variant native is left out, as was asked for")
    elif attnserve_kernels.library_path() is None:
        progress("attnserve-kernels has no library here: variant native is left out")
    else:
        progress("exporting native")
        # A bias is a matrix over all queries and keys.
        linear = not plan.biased and all(reach is not None for _, reach in plan.calls)
        variants["native"] = Exported(
            exported(Tracer(computing, plan, native=True)),
            memory="linear" if linear else "quadratic",
            providers=(CPU,),
            native=True,
        )

    if dtype != "FP32":
        progress("exporting half")
        by_lengths = Tracer(model, plan, by_lengths=True)
        graph = _graph(by_lengths, max(opset, LENGTHS_OPSET), stored)
        graphs.cast_outputs(graph, (HIDDEN, ENCODER_HIDDEN), ONNX[dtype])
        wide = graphs.widened(graph)
        variants["half"] = Exported(
            apart.bind(graph, stored, late=False),
            memory="quadratic" if by_lengths.matrices else "linear",
            providers=(CUDA,),
            verified_as=apart.bind(wide, stored, late=large),
        )

    def release() -> None:
        stored.clear()
        for variant in variants.values():
            for graph in (variant.graph, variant.verified_as):
                if graph is not None:
                    graph.parameters.clear()
        parameters.release(model)

    made: list[Case] = []

    def make(variant: str, generator: np.random.Generator) -> Iterable[Case]:
        if not made:  # all variants meet the same cases, which take longer to make than to meet
            made.extend(transformer_cases(exact, generator))
        return made

    if exact.info.pooling_refused:
        progress(f"{exact.info.pooling_refused}: the model will give no pooled vectors")
    return write_version(
        Description(
            name=name,
            version=version,
            kind="transformer",
            dtype=dtype,
            attention=_attention_info(exact.info.attentions[0]),
            source={
                "description": f"checkpoint {checkpoint.name}",
                "sha256": weights_sha256(checkpoint.folder),
            },
            transformer=_with_texts(exact.info, reader),
            tokenizer=None if reader is None else TOKENIZER,
        ),
        variants,
        target,
        cases=make,
        reference="Hugging Face transformers, eager attention, float64",
        extra_files={} if reader is None else {TOKENIZER: reader.file},
        progress=progress,
        release=release if large else None,
    )


def _reader(checkpoint: Checkpoint, progress: Progress) -> TextReader | None:
    """How texts become tokens; None where the model takes ids alone, which is said."""
    try:
        reader = text_reader(checkpoint.folder, checkpoint.config, checkpoint.sentences)
        reason = "there is no tokenizer"
    except TextError as error:
        reader, reason = None, str(error)
    if reader is None:
        progress(f"{reason}: the model will take ids, but no texts")
    if checkpoint.sentences is not None and checkpoint.sentences.other_prompts:
        names = ", ".join(checkpoint.sentences.other_prompts)
        progress(f"its prompts {names} are the caller's to put before texts")
    return reader


def _with_texts(info: Transformer, reader: TextReader | None) -> Transformer:
    if reader is None:
        return info
    # Where no file says whether the tokenizer tells texts apart, it does for whom it is of use.
    types = bool(info.token_types) if reader.types_unknown else reader.texts.types
    return replace(info, texts=replace(reader.texts, types=types))


def _admitted(checkpoint: Checkpoint, model: nn.Module, dtype: str, *, large: bool) -> Exact:
    """The first plan by which PyTorch makes of a ragged batch what transformers does.

    Args:
        checkpoint: to export.
        model: with parameters in the type in which they are stored.
        dtype: of that.
        large: whether it is the only one that there is room for.

    Raises:
        ExportError: there is none; says why not, and at which layer it first differs.
    """
    if large:
        with parameters.widened(model, torch.float32):
            return _compared(checkpoint, model, parameters.Eager(model), dtype, few=True)
    computing = model if dtype == "FP32" else parameters.in_fp32(model, values=True)
    eager = load_model(checkpoint, "eager", TORCH[dtype]).double()
    return _compared(checkpoint, computing, eager, dtype, few=False)


def _compared(
    checkpoint: Checkpoint,
    model: nn.Module,
    eager: nn.Module | parameters.Eager,
    dtype: str,
    *,
    few: bool,
) -> Exact:
    two_stacks, failures = checkpoint.family.two_stacks, []
    try:
        plans = observe(
            model, checkpoint.config, two_stacks=two_stacks, vocab_size=checkpoint.vocab_size
        )
    except ExportError:
        raise
    except Exception as error:  # whatever a model may raise
        raise ExportError(f"--checkpoint: it cannot be run: {first_line(error)}") from None
    for plan in plans:
        tracer = Tracer(model, plan)
        try:
            exact = Exact(eager, plan, _info(checkpoint, tracer), dtype, few)
            case = first_case(exact, np.random.default_rng(0))
            found = run_in_torch(tracer, case.feeds)
            assert case.derive is not None
            errors = errors_of(case, case.derive(found))
            differing = [name for name, error in errors.items() if not error <= ADMITTED]
            if not differing:
                return exact
            failures.append(
                f"{differing[0]} differs from eager attention on a padded batch, "
                f"by {errors[differing[0]]:.3g}"
            )
        except ExportError:
            raise
        except Exception as error:  # whatever a model may raise
            failures.append(f"it cannot be run on a padded batch: {first_line(error)}")
    raise ExportError(f"--checkpoint: {failures[0]}")


def run_in_torch(tracer: Tracer, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What a tracer's module gives, by the names of its outputs."""
    module = module_for(tracer)
    with torch.no_grad():
        made = module(*(torch.from_numpy(feeds[name]) for name in module.inputs))
    names = [*module.hidden, *tracer.outputs()]
    return {name: tensor.numpy() for name, tensor in zip(names, made, strict=True)}


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _info(checkpoint: Checkpoint, tracer: Tracer) -> Transformer:
    """The manifest's part, from a small run in PyTorch."""
    plan, module = tracer.plan, module_for(tracer)
    found = run_in_torch(tracer, {n: _tokens(n).example.numpy() for n in module.inputs})
    hidden_size, sentences = found[HIDDEN].shape[2], checkpoint.sentences
    refused = "" if sentences is None else sentences.refused_of(hidden_size)
    pooled = None if refused else sentences
    return Transformer(
        family=checkpoint.family.name,
        num_layers=len(tracer.calls[plan.attentions[0]]),
        hidden_size=hidden_size,
        vocab_size=checkpoint.vocab_size,
        max_seq_len=plan.max_seq_len,
        pad_token_id=checkpoint.pad_token_id,
        token_types=plan.token_types,
        pooling=None if pooled is None else pooled.pooling,
        pooling_refused=refused,
        normalize_pooled=pooled is not None and pooled.normalize,
        decoder_start_token_id=checkpoint.decoder_start_token_id,
        attentions=tuple(_described(name, calls) for name, calls in tracer.calls.items()),
    )


def _described(name: str, calls: Sequence[Call]) -> TransformerAttention:
    _, num_heads, _, head_dim = calls[0].query.shape
    return TransformerAttention(
        name=name,
        num_heads=num_heads,
        num_kv_heads=calls[0].key.shape[1],
        head_dim=head_dim,
        mask=_MASKS[name],
        position_bias=calls[0].bias is not None,
        layers=tuple(TransformerLayer(call.scale, _window(call), _sinks(call)) for call in calls),
    )


def _sinks(call: Call) -> tuple[float, ...] | None:
    return None if call.sinks is None else tuple(call.sinks.detach().float().tolist())


def _window(call: Call) -> int | None:
    """Keys up to its own that a query sees; None: all."""
    return None if call.reach is None or call.reach.left is None else call.reach.left + 1


def _graph(tracer: Tracer, opset: int, stored: Mapping[str, Tensor]) -> onnx.ModelProto:
    module = module_for(tracer)
    inputs = [_tokens(name) for name in module.inputs]
    most = tracer.plan.max_seq_len
    ends = {str(dim): most for entry in inputs for dim in entry.dims[1:]} if most else {}
    try:
        model = graphs.export_apart(
            module,
            inputs,
            lambda: [*module.hidden, *tracer.named],
            opset,
            ends=ends,
            apart=stored,
        )
    except Exception as error:  # whatever PyTorch's exporter may raise
        raise ExportError(f"--checkpoint: it cannot be traced: {first_line(error)}") from None
    if not tracer.plan.convention.positions:
        graphs.write_out_angles(model)
    if TYPES in module.inputs:
        graphs.default_to_zeros(model, TYPES, SOURCE[0])
    names = [*module.hidden, *tracer.named]
    graphs.rename_dims(model, {name: _dims(name, tracer.plan.kind) for name in names})
    return model


def _tokens(name: str) -> Input:
    dims = ("batch", TARGET_LEN if name in TARGET else SEQ_LEN)
    return Input(name, torch.ones([TRACED[dim] for dim in dims], dtype=torch.int64), dims)


def _dims(output: str, kind: str) -> dict[int, str]:
    """The dynamic dimensions of an output."""
    own = TARGET_LEN if kind == ENCODER_DECODER else SEQ_LEN
    if output in (HIDDEN, ENCODER_HIDDEN):
        return {0: "batch", 1: own if output == HIDDEN else SEQ_LEN}
    if output.startswith("weights_"):
        return {0: "batch", 2: SEQ_LEN, 3: SEQ_LEN}
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
