"""Which fields of config.json make a checkpoint impossible to export, and which class reads it.

Whether a model can be exported is found out by doing so and comparing (`observing`, `cases`). What
is here cannot be found out that way: what depends on lengths that nobody compares, and what would
be read as something else.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnserve_export.checkpoints.plans import IDS
from attnserve_export.checkpoints.sources import FEATURES, PIXELS
from attnserve_export.errors import ExportError


@dataclass(frozen=True)
class Rule:
    """A field of config.json that only some values are supported of.

    Attributes:
        field: its name; a dot leads into an object, a star into each of its entries.
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
        name: its `model_type`, for the manifest.
        model_class: in Hugging Face transformers, without a head for any task.
        two_stacks: whether it is an encoder with a decoder that attends to it.
        takes: what it reads: the argument's name.
    """

    name: str
    model_class: Any
    two_stacks: bool
    takes: str = IDS


# What a model may read.
TAKEN = (IDS, PIXELS, FEATURES)

_ABSENT_OR_FALSE = (False, None)
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional", None)
_NEW_ANGLES = "its angles depend on the length of each request"

_EVERY_FAMILY = (
    Rule("quantization_config", (None,), "quantized parameters are not read"),
    Rule("auto_map", (None,), "code that comes with a checkpoint is never run"),
    Rule("add_cross_attention", _ABSENT_OR_FALSE, "there is no source to attend to"),
    *(
        Rule(f"{place}.{kind}", _ROPE_TYPES, _NEW_ANGLES)
        for place in (
            "rope_scaling",
            "rope_parameters",
            "rope_parameters.*",
            "text_config.rope_scaling",
            "text_config.rope_parameters",
            "text_config.rope_parameters.*",
        )
        for kind in ("rope_type", "type")
    ),
)
_NO_DECODER = (
    Rule("position_embedding_type", ("absolute", None), "transformers no longer computes others"),
)
_RULES: Mapping[str, tuple[Rule, ...]] = {
    "bert": _NO_DECODER,
    "roberta": _NO_DECODER,
    "xlm-roberta": _NO_DECODER,
    "gpt2": (
        Rule("reorder_and_upcast_attn", _ABSENT_OR_FALSE, "for training in FP16; exports are FP32"),
    ),
}


def check_rules(config: Mapping[str, Any], where: str) -> None:
    """Refuse what config.json says and no comparison would find.

    Args:
        config: its content.
        where: the folder, for errors.

    Raises:
        ExportError: says which field, what it is and what is allowed.
    """
    named = config.get("model_type")
    own = _RULES.get(named, ()) if isinstance(named, str) else ()
    for rule in (*_EVERY_FAMILY, *own):
        for value in _values(config, rule.field.split(".")):
            if value not in rule.allowed:
                raise refusal(where, rule, value)


def family_of(config: Any, content: Mapping[str, Any], where: str) -> Family:
    """The family of a configuration.

    Args:
        config: as transformers reads it.
        content: of config.json.
        where: the folder, for errors.

    Raises:
        ExportError: there is no class for it, or it takes neither token ids nor pictures nor
            sounds.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    name = str(config.model_type)
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    if isinstance(model_class, (list, tuple)):
        model_class = model_class[0]
    two_stacks = bool(getattr(config, "is_encoder_decoder", False))
    made_of = [*(content.get("architectures") or ()), ""][0]
    if str(made_of).endswith("EncoderModel") and hasattr(transformers, made_of):
        model_class, two_stacks = getattr(transformers, made_of), False
    elif "is_encoder_decoder" in content and not two_stacks and model_class is not None:
        alone = model_class.__name__.removesuffix("Model") + "EncoderModel"
        if type(config)().is_encoder_decoder and hasattr(transformers, alone):
            model_class = getattr(transformers, alone)
    if model_class is None:
        raise ExportError(
            f"--checkpoint: {where}: config.json: model_type is {name!r}, of which transformers "
            "has no model without a head; allowed: one that AutoModel reads"
        )
    given = input_of(model_class)
    if given not in TAKEN:
        raise ExportError(
            f"--checkpoint: {where}: config.json: model_type is {name!r}, which takes {given}; "
            f"allowed: models that take {' or '.join(TAKEN)}"
        )
    return Family(name, model_class, two_stacks, given)


def input_of(model_class: Any) -> str:
    """What a model of transformers takes first: "input_ids", or what it has in their place."""
    taken = [name for name in inspect.signature(model_class.forward).parameters if name != "self"]
    named = str(getattr(model_class, "main_input_name", "input_ids"))
    if named != "input_ids" or named in taken:
        return named
    return taken[0] if taken else "nothing"


def _values(content: Any, path: list[str]) -> list[Any]:
    """All that a path leads to; None where it leads nowhere."""
    if not path:
        return [content]
    if not isinstance(content, Mapping):
        return [None]
    if path[0] == "*":
        return [value for entry in content.values() for value in _values(entry, path[1:])]
    return _values(content.get(path[0]), path[1:])


def refusal(where: str, rule: Rule, value: object) -> ExportError:
    """The error of a value that a rule does not allow."""
    names = " or ".join(repr(each) for each in rule.allowed if each is not None)
    return ExportError(
        f"--checkpoint: {where}: config.json: {rule.field} is {_short(value)}; "
        f"allowed: {names or 'not there'} ({rule.why})"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
