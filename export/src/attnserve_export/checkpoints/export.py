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
from torch import nn

from attnserve_export import graphs
from attnserve_export.checkpoints.cases import Exact, first_case, transformer_cases
from attnserve_export.checkpoints.checkpoint import (
    Checkpoint,
    load_model,
    tokenizer_json,
    weights_sha256,
)
from attnserve_export.checkpoints.modules import ENCODER_HIDDEN, HIDDEN, TARGET, module_for
from attnserve_export.checkpoints.observing import observe
from attnserve_export.checkpoints.plans import (
    CROSS,
    DECODER,
    EMBEDS,
    ENCODER,
    ENCODER_DECODER,
    IDS,
    Plan,
)
from attnserve_export.checkpoints.sources import embeds_of, model_input, preprocessor_of
from attnserve_export.checkpoints.tracing import IMPLEMENTATION, Call, Tracer
from attnserve_export.errors import ExportError
from attnserve_export.exporting import TRACED, Description, Exported, Progress, write_version
from attnserve_export.graphs import Input
from attnserve_export.runtime import CPU
from attnserve_export.verification import Case, errors_of

Array = NDArray[Any]

SEQ_LEN, TARGET_LEN = "seq_len", "target_len"

# What variants are called that take embeddings: fused_embeds, native_embeds.
_EMBEDS = "embeds"

# On CPUs, with the additions before them.
_SLOW_WHEN_FUSED = ("LayerNormalization", "Gelu")

# Largest absolute error in PyTorch of what is then exported; of a graph, less is allowed.
ADMITTED = 1e-3

_MASKS = {ENCODER: "bidirectional", DECODER: "causal", CROSS: "cross"}


def export_transformer(
    checkpoint: Checkpoint,
    target: Path,
    *,
    name: str,
    version: int,
    opset: int,
    native: bool = True,
    embeds: bool = False,
    progress: Progress,
) -> Manifest:
    """Export a whole checkpoint, FP32.

    Args:
        checkpoint: from `read_checkpoint`.
        target: the version's folder.
        name, version: of the model.
        opset: 23 or newer.
        native: whether to make the variant that needs the operators of attnserve-kernels.
        embeds: whether to make variants, too, that take token embeddings in the place of ids.
        progress: told what is going on.

    Raises:
        ExportError: the parameters do not fit the configuration.
        VerificationError: a graph missed its tolerance; nothing is written.
    """
    progress("loading the checkpoint")
    model = load_model(checkpoint, IMPLEMENTATION)
    progress("comparing its modules with transformers")
    exact = _admitted(checkpoint, model, load_model(checkpoint, "eager").double())
    plan = exact.plan
    read = {"": exact}
    if embeds:
        read[f"_{_EMBEDS}"] = _embeds_admitted(model, exact)
    linear = not plan.biased and all(reach is not None for _, reach in plan.calls)
    variants = {}
    for suffix, of in read.items():
        progress(f"exporting fused{suffix}")
        variants[f"fused{suffix}"] = Exported(_graph(Tracer(model, of.plan, native=False), opset))
    if not native:
        progress("variant native is left out, as was asked for")
    elif attnserve_kernels.library_path() is None:
        progress("attnserve-kernels has no library here: variant native is left out")
    elif plan.sinks:
        progress("it has sinks, which the operator does not take: variant native is left out")
    else:
        for suffix, of in read.items():
            progress(f"exporting native{suffix}")
            graph = _graph(Tracer(model, of.plan, native=True), opset)
            graphs.keep_apart(graph, _SLOW_WHEN_FUSED)
            variants[f"native{suffix}"] = Exported(
                graph,
                # A bias is a matrix over all queries and keys.
                memory="linear" if linear else "quadratic",
                providers=(CPU,),
                native=True,
            )

    made: dict[str, list[Case]] = {}

    def make(variant: str, generator: np.random.Generator) -> Iterable[Case]:
        # All variants meet the same cases, which take longer to make than to meet.
        suffix = f"_{_EMBEDS}" if variant.endswith(f"_{_EMBEDS}") else ""
        if suffix not in made:
            made[suffix] = list(transformer_cases(read[suffix], generator))
        return made[suffix]

    info = list(read.values())[-1].info
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


def _admitted(checkpoint: Checkpoint, model: nn.Module, eager: nn.Module) -> Exact:
    """The first plan by which PyTorch makes of a ragged batch what transformers does.

    Raises:
        ExportError: there is none; says why not, and at which layer it first differs.
    """
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
        raise ExportError(f"--checkpoint: it cannot be run: {first_line(error)}") from None
    for plan in plans:
        tracer = Tracer(model, plan, native=False)
        try:
            exact = Exact(eager, plan, _info(checkpoint, tracer))
            difference = _difference(exact, tracer)
            if difference is None:
                return exact
            failures.append(difference)
        except ExportError:
            raise
        except Exception as error:  # whatever a model may raise
            failures.append(f"it cannot be run on a padded batch: {first_line(error)}")
    raise ExportError(f"--checkpoint: {failures[0]}")


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
    table = exact.model.get_input_embeddings().weight  # type: ignore[operator]
    plan = replace(exact.plan, source=embeds_of(int(table.shape[1])))
    info = replace(exact.info, inputs=(model_input(plan.source, None),))
    embedded = Exact(exact.model, plan, info, float(table.detach().std()))
    try:
        difference = _difference(embedded, Tracer(model, plan, native=False))
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
    return Transformer(
        family=checkpoint.family.name,
        num_layers=len(tracer.calls[plan.attentions[0]]),
        hidden_size=found[HIDDEN].shape[2],
        vocab_size=checkpoint.vocab_size,
        max_seq_len=plan.max_seq_len,
        pad_token_id=checkpoint.pad_token_id,
        pooling=checkpoint.pooling,
        normalize_pooled=checkpoint.normalize_pooled,
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
        layers=tuple(TransformerLayer(call.scale, _window(call)) for call in calls),
    )


def _window(call: Call) -> int | None:
    """Keys up to its own that a query sees; None: all."""
    return None if call.reach is None or call.reach.left is None else call.reach.left + 1


def _graph(tracer: Tracer, opset: int) -> onnx.ModelProto:
    module, plan = module_for(tracer), tracer.plan
    run_in_torch(tracer, {n: _input(n, plan).example.numpy() for n in module.inputs})
    names = [*module.hidden, *tracer.outputs()]
    try:
        inputs = [_input(name, plan) for name in module.inputs]
        most = plan.max_seq_len
        ends = {str(dim): most for entry in inputs for dim in entry.dims[1:]} if most else {}
        model = graphs.export(module, inputs, names, opset, ends=ends)
    except Exception as error:  # whatever PyTorch's exporter may raise
        raise ExportError(f"--checkpoint: it cannot be traced: {first_line(error)}") from None
    if not plan.convention.positions:
        graphs.write_out_angles(model)
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
    own = {1: TARGET_LEN} if plan.kind == ENCODER_DECODER else of_source
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
