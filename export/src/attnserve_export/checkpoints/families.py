"""Which fields of config.json make a checkpoint impossible to export, and which class reads it.

Whether a model can be exported is found out by doing so and comparing (`observing`, `cases`). What
is here cannot be found out that way: what depends on lengths that nobody compares, and what would
be read as something else.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnserve_export.checkpoints.parts import class_beside, part_of
from attnserve_export.checkpoints.plans import DECODER, ENCODER, IDS, STATES
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
        model_class: in Hugging Face transformers, without a head for any task, if it is not one
            that says what part of others it is.
        two_stacks: whether it is an encoder with a decoder that attends to it.
        takes: what it reads: the argument's name. Of a decoder that attends to states that it is
            given, these.
        path: of the part that is exported, within the class; empty: all of it.
        config: of what is exported.
    """

    name: str
    model_class: Any
    two_stacks: bool
    takes: str = IDS
    path: str = ""
    config: Any = None


# What a model may read.
TAKEN = (IDS, PIXELS, FEATURES, STATES)

_ABSENT_OR_FALSE = (False, None)
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional", None)
_NEW_ANGLES = "its angles depend on the length of each request"

_EVERY_FAMILY = (
    Rule("quantization_config", (None,), "quantized parameters are not read"),
    Rule("auto_map", (None,), "code that comes with a checkpoint is never run"),
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


def family_of(config: Any, content: Mapping[str, Any], where: str, part: str = "") -> Family:
    """The family of a configuration.

    Args:
        config: as transformers reads it.
        content: of config.json.
        where: the folder, for errors.
        part: that is asked for, of `parts.PARTS`; empty: none.

    Raises:
        ExportError: there is no class for it, it has no such part, or that takes neither token ids
            nor pictures nor sounds.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    name = str(config.model_type)
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    if isinstance(model_class, (list, tuple)):
        model_class = model_class[0]
    if model_class is None:
        raise ExportError(
            f"--checkpoint: {where}: config.json: model_type is {name!r}, of which transformers "
            "has no model without a head; allowed: one that AutoModel reads"
        )
    if part:
        path, module = part_of(model_class, config, part)
        crossed = part == DECODER and _takes_states(type(module))
        takes = STATES if crossed else input_of(type(module))
        family = Family(name, model_class, False, takes, path, module.config)
    else:
        family = _as_said(name, model_class, config, content, where)
    if family.takes not in TAKEN:
        raise ExportError(
            f"--checkpoint: {where}: config.json: model_type is {name!r}, which takes "
            f"{family.takes}; allowed: models that take {' or '.join(TAKEN)}"
        )
    return family


def _as_said(
    name: str, model_class: Any, config: Any, content: Mapping[str, Any], where: str
) -> Family:
    """What config.json says that its parameters are of: the whole, or a part alone."""
    import transformers

    two_stacks = bool(getattr(config, "is_encoder_decoder", False))
    made_of = str([*(content.get("architectures") or ()), ""][0])
    crossed = bool(content.get("add_cross_attention")) and not two_stacks
    if made_of.endswith("EncoderModel") and hasattr(transformers, made_of):
        model_class, two_stacks = getattr(transformers, made_of), False
    elif made_of.endswith(("Encoder", "Decoder")) and class_beside(model_class, made_of):
        model_class, two_stacks = class_beside(model_class, made_of), False
        crossed = made_of.endswith("Decoder")
    elif "is_encoder_decoder" in content and not two_stacks and type(config)().is_encoder_decoder:
        alone = model_class.__name__.removesuffix("Model")
        if made_of == f"{alone}ForCausalLM":  # with its decoder inside, and nothing else
            takes = STATES if crossed else IDS
            causal = class_beside(model_class, made_of)
            return Family(name, causal, False, takes, "model.decoder", config)
        if hasattr(transformers, f"{alone}EncoderModel"):
            model_class = getattr(transformers, f"{alone}EncoderModel")
        else:
            path, module = part_of(model_class, config, ENCODER)
            return Family(name, model_class, False, input_of(type(module)), path, module.config)
    if crossed and not _takes_states(model_class):
        raise ExportError(
            f"--checkpoint: {where}: config.json: add_cross_attention is True; allowed: not there, "
            f"for a {model_class.__name__}, which takes no {STATES}"
        )
    takes = STATES if crossed else input_of(model_class)
    return Family(name, model_class, two_stacks, takes, "", config)


def _takes_states(model_class: Any) -> bool:
    return STATES in inspect.signature(model_class.forward).parameters


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
