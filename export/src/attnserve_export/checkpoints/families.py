"""Which checkpoints can be exported: by family, and within it by the fields of config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnserve_export.errors import ExportError

ENCODER, DECODER, ENCODER_DECODER = "encoder", "decoder", "encoder-decoder"


@dataclass(frozen=True)
class Rule:
    """A field of config.json that only some values are supported of.

    Attributes:
        field: its name; a dot leads into an object.
        allowed: its values; None stands for a field that is not there.
        why: the others are not supported.
    """

    field: str
    allowed: tuple[object, ...]
    why: str


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        name: for the manifest.
        kind: "encoder", "decoder" or "encoder-decoder".
        model_class: in Hugging Face transformers, without a head for any task.
        rules: what its config.json must say.
        max_seq_len: from a configuration; 0 where positions have no end.
        numbers: fields that `max_seq_len` reads.
        arguments: of the model class.
        positions_in_table: whether the longest sequence is bounded by a table of positions.
    """

    name: str
    kind: str
    model_class: str
    rules: tuple[Rule, ...] = ()
    max_seq_len: Callable[[Any], int] = lambda config: int(config.max_position_embeddings)
    numbers: tuple[str, ...] = ("max_position_embeddings",)
    arguments: Mapping[str, object] = field(default_factory=dict)
    positions_in_table: bool = True


_ABSENT_OR_FALSE = (False, None)

_EVERY_FAMILY = (
    Rule("quantization_config", (None,), "quantized parameters are not read"),
    Rule("auto_map", (None,), "code that comes with a checkpoint is never run"),
)
_NO_DECODER = (
    Rule("is_decoder", _ABSENT_OR_FALSE, "a BERT made into a decoder is not supported"),
    Rule("add_cross_attention", _ABSENT_OR_FALSE, "there is no source to attend to"),
    Rule("position_embedding_type", ("absolute", None), "transformers no longer computes others"),
)
_GPT2 = (
    Rule("add_cross_attention", _ABSENT_OR_FALSE, "there is no source to attend to"),
    Rule("reorder_and_upcast_attn", _ABSENT_OR_FALSE, "for training in FP16; exports are FP32"),
)
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", None)
_NEW_ANGLES = "its angles depend on the length of each request"
_ROTARY = tuple(
    Rule(f"{place}.{kind}", _ROPE_TYPES, _NEW_ANGLES)
    for place in ("rope_scaling", "rope_parameters")
    for kind in ("rope_type", "type")
)
_ENCODER_DECODER = (
    Rule("is_encoder_decoder", (True, None), "an encoder or decoder alone is not supported"),
)


def _after_padding(config: Any) -> int:
    """RoBERTa counts positions from the one after its padding token's."""
    return int(config.max_position_embeddings) - int(config.pad_token_id) - 1


def _no_end(config: Any) -> int:
    return 0


_NO_POOLER = {"add_pooling_layer": False}


def _like_roberta(name: str, model_class: str) -> Family:
    numbers = ("max_position_embeddings", "pad_token_id")
    return Family(name, ENCODER, model_class, _NO_DECODER, _after_padding, numbers, _NO_POOLER)


FAMILIES: Mapping[str, Family] = {
    "bert": Family("bert", ENCODER, "BertModel", _NO_DECODER, arguments=_NO_POOLER),
    "roberta": _like_roberta("roberta", "RobertaModel"),
    "xlm-roberta": _like_roberta("xlm-roberta", "XLMRobertaModel"),
    "distilbert": Family("distilbert", ENCODER, "DistilBertModel"),
    "gpt2": Family("gpt2", DECODER, "GPT2Model", _GPT2),
    "llama": Family("llama", DECODER, "LlamaModel", _ROTARY, positions_in_table=False),
    "mistral": Family("mistral", DECODER, "MistralModel", _ROTARY, positions_in_table=False),
    "qwen2": Family("qwen2", DECODER, "Qwen2Model", _ROTARY, positions_in_table=False),
    "qwen3": Family("qwen3", DECODER, "Qwen3Model", _ROTARY, positions_in_table=False),
    "t5": Family(
        "t5", ENCODER_DECODER, "T5Model", _ENCODER_DECODER, _no_end, (), positions_in_table=False
    ),
    "bart": Family("bart", ENCODER_DECODER, "BartModel", _ENCODER_DECODER),
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a configuration.

    Args:
        config: the content of config.json.
        where: the folder, for errors.

    Raises:
        ExportError: it is not supported; says which field, what it is and what is allowed.
    """
    named = config.get("model_type")
    family = FAMILIES.get(named) if isinstance(named, str) else None
    if family is None:
        rule = Rule("model_type", tuple(FAMILIES), "other families have not been verified")
        raise _refusal(where, rule, named)
    for rule in (*_EVERY_FAMILY, *family.rules):
        value: Any = config
        for part in rule.field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value not in rule.allowed:
            raise _refusal(where, rule, value)
    return family


def _refusal(where: str, rule: Rule, value: object) -> ExportError:
    names = " or ".join(repr(each) for each in rule.allowed if each is not None)
    return ExportError(
        f"--checkpoint: {where}: config.json: {rule.field} is {_short(value)}; "
        f"allowed: {names or 'not there'} ({rule.why})"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
