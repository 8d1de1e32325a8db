"""A checkpoint to a version in the model repository."""

import inspect
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
    TARGET,
    TYPES,
    module_for,
)
from attnserve_export.checkpoints.observing import observe
from attnserve_export.checkpoints.parts import TEXT, VISION, parts_of
from attnserve_export.checkpoints.plans import (
    CROSS,
    DECODER,
    EMBEDS,
    ENCODER,
    IDS,
    STATES,
    Plan,
)
from attnserve_export.checkpoints.sources import embeds_of, model_input, preprocessor_of
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

# What variants are called that take embeddings: fused_embeds, native_embeds.
_EMBEDS = "embeds"

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
    embeds: bool = False,
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
        embeds: whether to make variants, too, that take token embeddings in the place of ids.
        large: whether to have its parameters in memory only once; None: from `LARGE` on.
        progress: told what is going on.

    Raises:
        ExportError: the parameters do not fit the configuration.
        VerificationError: a graph missed its tolerance; nothing is written.
    """
    progress("loading the checkpoint")
    model = load_model(checkpoint, IMPLEMENTATION, TORCH[dtype])
    large = parameters.count_of(model) >= LARGE if large is None else large
    progress("comparing its modules with transformers")
    read = _admitted(checkpoint, model, dtype, large=large, embeds=embeds)
    plan = read[""].plan
    has_texts = plan.source.name == IDS or plan.has_target
    reader = _reader(checkpoint, progress) if has_texts else None
    computing = model if dtype == "FP32" else parameters.in_fp32(model, values=False)
    stored = {f"{PREFIX}{name}": tensor for name, tensor in parameters.stored(model).items()}

    def exported(tracer: Tracer) -> Graph:
        graph = _graph(tracer, opset, stored)
        graphs.cast_outputs(graph, (HIDDEN, ENCODER_HIDDEN), ONNX[dtype])
        if tracer.native:
            graphs.keep_apart(graph, _SLOW_WHEN_FUSED)
        return apart.bind(graph, stored, late=large)

    variants = {}
    for suffix, of in read.items():
        progress(f"exporting fused{suffix}")
        variants[f"fused{suffix}"] = Exported(exported(Tracer(computing, of.plan)))
    if not native:
        progress("variant native is left out, as was asked for")
    elif attnserve_kernels.library_path() is None:
        progress("attnserve-kernels has no library here: variant native is left out")
    else:
        # A bias is a matrix over all queries and keys.
        linear = not plan.biased and all(reach is not None for _, reach in plan.calls)
        for suffix, of in read.items():
            progress(f"exporting native{suffix}")
            variants[f"native{suffix}"] = Exported(
                exported(Tracer(computing, of.plan, native=True)),
                memory="linear" if linear else "quadratic",
                providers=(CPU,),
                native=True,
            )

    for suffix, of in read.items() if dtype != "FP32" else ():
        progress(f"exporting half{suffix}")
        by_lengths = Tracer(model, of.plan, by_lengths=True)
        graph = _graph(by_lengths, max(opset, LENGTHS_OPSET), stored)
        graphs.cast_outputs(graph, (HIDDEN, ENCODER_HIDDEN), ONNX[dtype])
        wide = graphs.widened(graph)
        variants[f"half{suffix}"] = Exported(
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

    made: dict[str, list[Case]] = {}

    def make(variant: str, generator: np.random.Generator) -> Iterable[Case]:
        # All variants meet the same cases, which take longer to make than to meet.
        suffix = f"_{_EMBEDS}" if variant.endswith(f"_{_EMBEDS}") else ""
        if suffix not in made:
            made[suffix] = list(transformer_cases(read[suffix], generator))
        return made[suffix]

    info = list(read.values())[-1].info
    if info.pooling_refused:
        progress(f"{info.pooling_refused}: the model will give no pooled vectors")
    return write_version(
        Description(
            name=name,
            version=version,
            kind="transformer",
            dtype=dtype,
            attention=_attention_info(info.attentions[0]),
            source={
                "description": f"checkpoint {checkpoint.name}"
                + (f", its {checkpoint.family.path}" if checkpoint.family.path else ""),
                "sha256": weights_sha256(checkpoint.folder),
            },
            transformer=_with_texts(info, reader),
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


def _admitted(
    checkpoint: Checkpoint, model: nn.Module, dtype: str, *, large: bool, embeds: bool
) -> dict[str, Exact]:
    """The first plan by which PyTorch makes of a ragged batch what transformers does.

    Args:
        checkpoint: to export.
        model: with parameters in the type in which they are stored.
        dtype: of that.
        large: whether it is the only one that there is room for.
        embeds: whether it is to read token embeddings, too.

    Returns:
        By what is added to the names of variants: nothing, or what tells that they read embeddings.

    Raises:
        ExportError: there is none; says why not, and at which layer it first differs.
    """
    if large:
        with parameters.widened(model, torch.float32):
            eager = parameters.Eager(model)
            return _compared(checkpoint, model, eager, dtype, few=True, embeds=embeds)
    computing = model if dtype == "FP32" else parameters.in_fp32(model, values=True)
    exact = load_model(checkpoint, "eager", TORCH[dtype]).double()
    return _compared(checkpoint, computing, exact, dtype, few=False, embeds=embeds)


def _compared(
    checkpoint: Checkpoint,
    model: nn.Module,
    eager: nn.Module | parameters.Eager,
    dtype: str,
    *,
    few: bool,
    embeds: bool,
) -> dict[str, Exact]:
    failures = []
    try:
        plans = observe(
            model,
            checkpoint.config,
            takes=checkpoint.family.takes,
            two_stacks=checkpoint.family.two_stacks,
            vocab_size=checkpoint.vocab_size,
        )
    except ExportError:
        raise
    except Exception as error:  # whatever a model may raise
        parts = " or ".join(_towers(checkpoint))
        instead = f"; allowed: a part of it that reads one thing, --part {parts}" if parts else ""
        raise ExportError(f"--checkpoint: it cannot be run: {first_line(error)}{instead}") from None
    for plan in plans:
        tracer = Tracer(model, plan)
        try:
            exact = Exact(eager, plan, _info(checkpoint, tracer), dtype, few)
            difference = _difference(exact, tracer)
            if difference is None:
                read = {"": exact}
                if embeds:
                    read[f"_{_EMBEDS}"] = _embeds_admitted(model, exact)
                return read
            failures.append(difference)
        except ExportError:
            raise
        except Exception as error:  # whatever a model may raise
            failures.append(f"it cannot be run on a padded batch: {first_line(error)}")
    raise ExportError(f"--checkpoint: {failures[0]}")


def _towers(checkpoint: Checkpoint) -> list[str]:
    """The parts by which a model of texts and pictures could be exported."""
    if checkpoint.family.path:
        return []
    try:
        found = parts_of(checkpoint.family.model_class, checkpoint.whole)
    except Exception:  # whatever a model may raise
        return []
    return [part for part in (TEXT, VISION) if part in found]


def _difference(exact: Exact, tracer: Tracer) -> str | None:
    """At which layer PyTorch first makes something else of a batch than transformers does."""
    case = first_case(exact, np.random.default_rng(0))
    assert case.derive is not None
    errors = errors_of(case, case.derive(run_in_torch(tracer, case.feeds)))
    name = next((name for name, error in errors.items() if not error <= ADMITTED), None)
    batch = "a padded batch" if exact.plan.source.ragged else "a batch"
    return name and f"{name} differs from eager attention on {batch}, by {errors[name]:.3g}"


def _embeds_admitted(model: nn.Module, exact: Exact) -> Exact:
    """The same model, reading token embeddings.

    Raises:
        ExportError: it reads none, or makes something else of them than transformers does.
    """
    allowed = "allowed: for models that take token ids or their embeddings"
    where = "--inputs-embeds: given"
    if exact.plan.source.name != IDS or EMBEDS not in inspect.signature(model.forward).parameters:
        raise ExportError(f"{where} for a model that takes {exact.plan.source.name}; {allowed}")
    table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    plan = replace(exact.plan, source=embeds_of(int(table.shape[1])), token_types=0)
    info = replace(exact.info, inputs=(model_input(plan.source, None),))
    embedded = replace(exact, plan=plan, info=info, embeds_size=float(table.float().std()))
    try:
        difference = _difference(embedded, Tracer(model, plan))
    except Exception as error:  # whatever a model may raise
        difference = f"it cannot be run: {first_line(error)}"
    if difference is not None:
        raise ExportError(f"{where}: of embeddings, {difference}")
    return embedded


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
    found = run_in_torch(tracer, {n: _input(n, plan).example.numpy() for n in module.inputs})
    source = plan.source
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
        takes_ids=source.name == IDS,
        inputs=()
        if source.name == IDS
        else (model_input(source, preprocessor_of(checkpoint.folder, source)),),
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
    module, plan = module_for(tracer), tracer.plan
    inputs = [_input(name, plan) for name in module.inputs]
    most = plan.max_seq_len
    ends = {str(dim): most for entry in inputs for dim in entry.dims[1:]} if most else {}
    if plan.source.name == STATES:  # which may be of any length
        ends.pop(SEQ_LEN, None)
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
    if not plan.convention.positions:
        graphs.write_out_angles(model)
    if TYPES in module.inputs:
        graphs.default_to_zeros(model, TYPES, IDS)
    names = [*module.hidden, *tracer.named]
    graphs.rename_dims(model, {name: _dims(name, plan) for name in names})
    return model


def _input(name: str, plan: Plan) -> Input:
    dims: tuple[str | int, ...] = ("batch", TARGET_LEN if name in TARGET else SEQ_LEN)
    dtype = torch.int64
    if name == plan.source.name != IDS:
        dims, dtype = ("batch", *plan.source.shape), torch.float32
    sizes = [TRACED[dim] if isinstance(dim, str) else dim for dim in dims]
    return Input(name, torch.ones(sizes, dtype=dtype), dims)


def _dims(output: str, plan: Plan) -> dict[int, str]:
    """The dynamic dimensions of an output."""
    of_source = {} if not plan.source.ragged else {1: SEQ_LEN}
    own = {1: TARGET_LEN} if plan.has_target else of_source
    if output in (HIDDEN, ENCODER_HIDDEN):
        return {0: "batch"} | (own if output == HIDDEN else of_source)
    if output.startswith("weights_"):
        return {0: "batch", 2: own[1], 3: own[1]} if own else {0: "batch"}
    attention, _, rest = output.partition("_")
    if rest == "position_bias":
        return {1: f"{attention}_distances"}
    source = attention == ENCODER or (attention == CROSS and rest.startswith("key"))
    length = (of_source if source else own).get(1)
    return {0: "batch"} if length is None else {0: "batch", 2: length}


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
