"""Parts of a checkpoint that are models of their own: an encoder, a decoder, a tower."""

import copy
import sys
from typing import Any

import torch

from attnserve_export.checkpoints.plans import DECODER, ENCODER
from attnserve_export.errors import ExportError

TEXT, VISION = "text", "vision"
PARTS = (ENCODER, DECODER, TEXT, VISION)

# What transformers calls them, within a model.
_NAMES = {
    ENCODER: ("encoder",),
    DECODER: ("decoder",),
    TEXT: ("text_model", "language_model"),
    VISION: ("vision_model", "vision_tower", "image_tower", "visual"),
}


def parts_of(model_class: Any, config: Any) -> dict[str, str]:
    """The parts that a model has, by `PARTS`: their paths within it.

    Args:
        model_class: of transformers.
        config: of it.

    Raises:
        Exception: of transformers: the configuration makes no model.
    """
    model, found = _empty(model_class, config), {}
    for part, names in _NAMES.items():
        for name in names:
            if hasattr(getattr(model, name, None), "from_pretrained"):
                found[part] = name
                break
    return found


def part_of(model_class: Any, config: Any, part: str) -> tuple[str, Any]:
    """Where a part is within a model, and the part itself, without memory for its parameters.

    Args:
        model_class, config: of the model.
        part: of `PARTS`.

    Raises:
        ExportError: the model has none such; says which it has.
    """
    try:
        found = parts_of(model_class, config)
    except Exception as error:  # whatever a model may raise
        raise ExportError(
            f"--part: {model_class.__name__} cannot be made: {type(error).__name__}: {error}"
        ) from None
    if part not in found:
        raise ExportError(
            f"--part: given {part} for a {model_class.__name__}; "
            f"allowed: {' or '.join(found) or 'none: it has no parts'}"
        )
    return found[part], _empty(model_class, config).get_submodule(found[part])


def class_beside(model_class: Any, name: str) -> Any:
    """A class that transformers has in the same module, which it may not export; None: none."""
    found = getattr(sys.modules[model_class.__module__], name, None)
    return found if hasattr(found, "from_pretrained") else None


def _empty(model_class: Any, config: Any) -> Any:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))
