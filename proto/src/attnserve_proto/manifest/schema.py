"""What `model.json` holds. Each field says how it is read and checked (`fields`);
docs/model-repository.md says what it means.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from attnserve_proto.manifest.fields import (
    above_zero,
    anything,
    by_name,
    finite,
    integer,
    listed,
    number,
    one_of,
    optional,
    record,
    text,
    yes_or_no,
    zero_or_more,
)

# Of models and variants.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
MOST_VERSION = 2**63 - 1

KINDS = ("core", "layer", "transformer")
DTYPES = ("FP32", "FP16", "BF16")
MASKS = ("bidirectional", "causal", "cross")
ALIGNMENTS = ("top-left", "bottom-right")
STYLES = ("half", "interleaved")
MEMORY = ("linear", "quadratic")
POOLINGS = ("mean", "cls", "last", "max", "mean_sqrt_len", "weightedmean")
SIDES = ("right", "left")
ATTENTIONS = ("encoder", "decoder", "cross")

# What an encoder has made, for a decoder alone to attend to.
STATES = "encoder_hidden_states"

# What a transformer takes that is no token ids.
TENSORS = ("inputs_embeds", "pixel_values", "input_features", STATES)

Size = Annotated[int, integer()]
Text = Annotated[str, text]


@dataclass(frozen=True, slots=True)
class RotaryEmbedding:
    """A rotary embedding of the first `dims` elements of each query and key."""

    style: Annotated[str, one_of(*STYLES)]
    dims: Size
    base: Annotated[float, above_zero]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention that a model computes; of a transformer, its first one.

    Attributes:
        sinks: of each head, a logit that takes part in the softmax and has no value; None: none.
    """

    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    value_head_dim: Size
    mask: Annotated[str, one_of(*MASKS)]
    window: Annotated[int | None, optional(integer())] = None
    window_right: Annotated[int | None, optional(integer(0))] = None
    chunk: Annotated[int | None, optional(integer())] = None
    alignment: Annotated[str, one_of(*ALIGNMENTS)] = "top-left"
    alibi: Annotated[bool, yes_or_no] = False
    rotary: Annotated[RotaryEmbedding | None, optional(record(RotaryEmbedding))] = None
    scale: Annotated[float, above_zero]
    softcap: Annotated[float, zero_or_more] = 0.0
    sinks: Annotated[tuple[float, ...] | None, optional(listed(finite))] = None


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer model has besides: E, and E of the context (None: self-attention)."""

    embed_dim: Size
    context_dim: Annotated[int | None, optional(integer())]


@dataclass(frozen=True, slots=True)
class TransformerLayer:
    """What may differ from layer to layer: the scale, keys that a query sees (None: all), sinks."""

    scale: Annotated[float, above_zero]
    window: Annotated[int | None, optional(integer())] = None
    sinks: Annotated[tuple[float, ...] | None, optional(listed(finite))] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerAttention:
    """One attention of a transformer.

    Attributes:
        name: "encoder", "decoder" or, between the two, "cross".
        mask: as the name says: "bidirectional", "causal", "cross".
        position_bias: whether the graph gives a bias by the distance of key and query.
        layers: one entry each.
    """

    name: Annotated[str, one_of(*ATTENTIONS)]
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    mask: Annotated[str, one_of(*MASKS)]
    position_bias: Annotated[bool, yes_or_no] = False
    layers: Annotated[tuple[TransformerLayer, ...], listed(record(TransformerLayer))]


def _transformer_attention(where: str, content: Any) -> TransformerAttention:
    name = one_of(*ATTENTIONS)(f"{where} name", content["name"])
    return record(TransformerAttention)(f"{where} {name}", content)


def _size_or_name(where: str, value: Any) -> int | str:
    return value if isinstance(value, str) and value else integer()(where, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """How a picture becomes tokens: `first` that stand for no place in it, then one for each patch,
    row by row.
    """

    first: Annotated[int, integer(0)]
    rows: Size
    columns: Size


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """A tensor that a transformer takes and that holds no token ids.

    Attributes:
        name: of it, in the graphs.
        dtype: of its elements.
        shape: of one sequence, without the batch; a name is a dimension of any size, the length.
        tokens: what one sequence is read as; None: as many as the dimension with the name.
        patches: of pictures whose patches are tokens.
        frames_per_token: of sounds whose frames, the last dimension, become fewer tokens.
        preprocessor: what the checkpoint says of how the tensor is made, as transformers has it.
    """

    name: Annotated[str, one_of(*TENSORS)]
    dtype: Annotated[str, one_of(*DTYPES)]
    shape: Annotated[tuple[int | str, ...], listed(_size_or_name)]
    tokens: Annotated[int | None, optional(integer())] = None
    patches: Annotated[Patches | None, optional(record(Patches))] = None
    frames_per_token: Annotated[int | None, optional(integer())] = None
    preprocessor: Annotated[Mapping[str, Any] | None, anything] = None


def _model_input(where: str, content: Any) -> ModelInput:
    name = one_of(*TENSORS)(f"{where} name", content["name"])
    return record(ModelInput)(f"{where} {name}", content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """How texts become tokens, beyond what the tokenizer's file says.

    Attributes:
        max_len: tokens that a text is cut to, where it is; None: as many as the model takes.
        cut: whether longer ones are cut, unless the request says otherwise.
        side: the end that is cut off.
        prompt: what comes before every text, of a pair before the first.
        prompt_pooled: whether the prompt's tokens count for the pooled vector.
        split_special: whether special tokens that a text spells are plain text.
        types: whether the tokenizer says which tokens are of a pair's second text.
    """

    max_len: Annotated[int | None, optional(integer())] = None
    cut: Annotated[bool, yes_or_no] = False
    side: Annotated[str, one_of(*SIDES)] = "right"
    prompt: Text = ""
    prompt_pooled: Annotated[bool, yes_or_no] = True
    split_special: Annotated[bool, yes_or_no] = False
    types: Annotated[bool, yes_or_no] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """What a transformer model has besides.

    Attributes:
        num_layers: of its first attention.
        vocab_size: 0 of a model that takes no token ids.
        max_seq_len: 0 where positions have no end; of tokens, which a picture, a sound and what an
            encoder has made of something are not.
        token_types: how many `token_type_ids` tell apart; 0: the graphs take none.
        pooling: None: there is none.
        pooling_refused: what its checkpoint says of pooling, where that is not supported; empty:
            it says nothing.
        decoder_start_token_id: what a target starts with; None: the model has no targets.
        attentions: one; three of an encoder-decoder, and two of a decoder that is given states.
        takes_ids: whether its source may be token ids.
        inputs: tensors that are its source instead, or that stand beside it.
    """

    family: Text
    num_layers: Size
    hidden_size: Size
    vocab_size: Annotated[int, integer(0)]
    max_seq_len: Annotated[int, integer(0)]
    pad_token_id: Annotated[int, lambda where, value: integer(0)(where, value or 0)]
    token_types: Annotated[int, integer(0)] = 0
    pooling: Annotated[str | None, optional(one_of(*POOLINGS))] = None
    pooling_refused: Text = ""
    normalize_pooled: Annotated[bool, lambda _, value: bool(value)] = False
    decoder_start_token_id: Annotated[int | None, optional(integer(0))] = None
    texts: Annotated[Texts, record(Texts)] = Texts()
    attentions: Annotated[tuple[TransformerAttention, ...], listed(_transformer_attention)]
    takes_ids: Annotated[bool, yes_or_no] = True
    inputs: Annotated[tuple[ModelInput, ...], listed(_model_input)] = ()

    @property
    def has_target(self) -> bool:
        """Whether it has a decoder that attends to its source."""
        return self.decoder_start_token_id is not None

    @property
    def has_two_stacks(self) -> bool:
        """Whether it is an encoder-decoder, and not a decoder that is given states to attend to."""
        return self.has_target and self.input(STATES) is None

    def attention(self, name: str) -> TransformerAttention:
        """An attention by its name, which must be one of the model's."""
        return next(attention for attention in self.attentions if attention.name == name)

    def input(self, name: str) -> ModelInput | None:
        """A tensor that it takes, by its name; None: it takes none such."""
        return next((entry for entry in self.inputs if entry.name == name), None)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """An input or output of a graph; a dimension is an integer or a symbol's name."""

    name: Text
    dtype: Text
    shape: Annotated[tuple[int | str, ...], listed(anything)]


@dataclass(frozen=True, slots=True)
class CaseResult:
    """The largest absolute error of one case, over all outputs."""

    case: Text
    dims: Annotated[Mapping[str, int], anything]
    max_abs_error: Annotated[float, number]
    tolerance: Annotated[float, number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How far a graph is from its reference.

    Attributes:
        reference: what it was compared with, in words.
        seed: of the inputs.
        tolerance: the largest of its cases'.
        max_abs_error: by output.
    """

    reference: Text = ""
    seed: Annotated[int, anything] = 0
    tolerance: Annotated[float, number]
    max_abs_error: Annotated[Mapping[str, float], by_name(number)]
    cases: Annotated[tuple[CaseResult, ...], listed(record(CaseResult))] = ()

    @property
    def largest_error(self) -> float:
        """Of all outputs."""
        return max(self.max_abs_error.values(), default=0.0)


def _variant_name(where: str, value: Any) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"{where}: {value!r}; allowed: {NAME.pattern}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantEntry:
    """One ONNX graph of a model.

    Attributes:
        providers: of ONNX Runtime, that it suits.
        memory: how what it holds while it runs grows with the length.
        native: whether it needs the operators of attnserve-kernels.
    """

    name: Annotated[str, _variant_name]
    file: Text
    inputs: Annotated[tuple[TensorEntry, ...], listed(record(TensorEntry))]
    outputs: Annotated[tuple[TensorEntry, ...], listed(record(TensorEntry))]
    providers: Annotated[tuple[str, ...], listed(text)]
    memory: Annotated[str, one_of(*MEMORY)] = "quadratic"
    native: Annotated[bool, yes_or_no] = False
    verification: Annotated[Verification, record(Verification)]

    @property
    def input_names(self) -> tuple[str, ...]:
        """In the order of the graph."""
        return tuple(tensor.name for tensor in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """In the order of the graph."""
        return tuple(tensor.name for tensor in self.outputs)


@dataclass(frozen=True, slots=True)
class Pick:
    """Which variants to prefer up to a length (the longer of Sq and Sk; None: any), best first."""

    up_to: Annotated[int | None, optional(integer())]
    variants: Annotated[tuple[str, ...], listed(text)]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and SHA-256 (hex) of one file."""

    sha256: Text
    bytes: Annotated[int, lambda _, value: int(value)]


def _picks(where: str, content: Any) -> dict[str, tuple[Pick, ...]]:
    """By provider; rows of rising lengths."""
    picks = {}
    for provider, rows in (content or {}).items():
        last: int | None = 0
        picks[str(provider)] = listed(record(Pick))(where, rows)
        for pick in picks[str(provider)]:
            if last is None or (pick.up_to is not None and pick.up_to <= last):
                given = f"{pick.up_to} after {last}"
                raise ValueError(f"{where}: up_to: {given}; allowed: rising, null last")
            last = pick.up_to
    return picks


def _source(where: str, content: Any) -> dict[str, Any]:
    return content | {"description": str(content["description"])}  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One version of one model.

    Attributes:
        opset: of the first variant.
        tokenizer: its file.
        picks: by execution provider.
        tuned: by execution provider: what was measured, when and where.
        files: all of the version but the manifest, by name; empty before they are written.
        source: `description` (one line), and what else is known of where it comes from.
        created_by: versions of tools.
    """

    name: Text
    version: Annotated[int, integer(highest=MOST_VERSION)]
    kind: Annotated[str, one_of(*KINDS)]
    dtype: Annotated[str, one_of(*DTYPES)]
    opset: Size
    attention: Annotated[Attention, record(Attention)]
    layer: Annotated[Layer | None, optional(record(Layer))] = None
    transformer: Annotated[Transformer | None, optional(record(Transformer))] = None
    tokenizer: Annotated[str | None, optional(text)] = None
    variants: Annotated[tuple[VariantEntry, ...], listed(record(VariantEntry))]
    picks: Annotated[Mapping[str, tuple[Pick, ...]], _picks] = field(default_factory=dict)
    tuned: Annotated[Mapping[str, Any] | None, anything] = None
    files: Annotated[Mapping[str, FileEntry], by_name(record(FileEntry))] = field(
        default_factory=dict
    )
    source: Annotated[Mapping[str, Any], _source]
    created_by: Annotated[Mapping[str, str], anything] = field(default_factory=dict)
