"""Pictures and sounds made into what a served model reads, as its checkpoint says."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from attnserve_client import _tensors
from attnserve_client._client import AttentionClient
from attnserve_client._messages import TokensOptions
from attnserve_client._results import Array, Model, TokensResult

PIXELS, FEATURES = "pixel_values", "input_features"


def image_inputs(images: Any, *, model: Model, processor: Any = None) -> dict[str, Array]:
    """Pictures as a model reads them.

    Args:
        images: one or a list of them: paths, PIL images, or arrays [height, width, 3] of 0..255.
        model: as `client.get_model` describes it.
        processor: an image processor of transformers, or the folder of one; None: made from what
            the checkpoint said when it was exported.

    Returns:
        `pixel_values`, [B, channels, height, width], which `attend_tokens` takes in the place of
        texts.

    Raises:
        ValueError: the model reads no pictures, or nothing is known of how they are made.
        OSError: a path is no picture.
        ImportError: transformers or Pillow are not installed.
    """
    listed = list(images) if isinstance(images, list | tuple) else [images]
    opened = [_opened(each) if isinstance(each, str | Path) else each for each in listed]
    made = _processor(model, PIXELS, processor)(images=opened, return_tensors="np")
    return {PIXELS: _tensors.as_array(made[PIXELS], PIXELS)}


def sound_inputs(
    sounds: Any, *, model: Model, sampling_rate: int, processor: Any = None
) -> dict[str, Array]:
    """Sounds as a model reads them.

    Args:
        sounds: one or a list of them: arrays [samples], -1..1.
        model: as `client.get_model` describes it.
        sampling_rate: samples a second; most models allow one alone.
        processor: a feature extractor of transformers, or the folder of one; None: made from what
            the checkpoint said when it was exported.

    Returns:
        `input_features`, [B, mel bins, frames], which `attend_tokens` takes in the place of texts.

    Raises:
        ValueError: the model reads no sounds, or nothing is known of how they are made, or not at
            this rate.
        ImportError: transformers is not installed.
    """
    listed = list(sounds) if isinstance(sounds, list | tuple) else [sounds]
    extract = _processor(model, FEATURES, processor)
    made = extract(
        [_tensors.as_array(each, f"sounds[{index}]") for index, each in enumerate(listed)],
        sampling_rate=sampling_rate,
        return_tensors="np",
    )
    return {FEATURES: _tensors.as_array(made[FEATURES], FEATURES)}


def attend_images(
    client: AttentionClient,
    images: Any,
    *,
    processor: Any = None,
    timeout: float | None = 60.0,
    **options: Unpack[TokensOptions],
) -> TokensResult:
    """Run pictures through a served model; arguments as of `image_inputs` and `attend_tokens`."""
    described = client.get_model(options["model"], options.get("version", ""), timeout=timeout)
    given = image_inputs(images, model=described, processor=processor)
    return client.attend_tokens(given, timeout=timeout, **options)


def attend_sounds(
    client: AttentionClient,
    sounds: Any,
    *,
    sampling_rate: int,
    processor: Any = None,
    timeout: float | None = 60.0,
    **options: Unpack[TokensOptions],
) -> TokensResult:
    """Run sounds through a served model; arguments as of `sound_inputs` and `attend_tokens`."""
    described = client.get_model(options["model"], options.get("version", ""), timeout=timeout)
    given = sound_inputs(sounds, model=described, sampling_rate=sampling_rate, processor=processor)
    return client.attend_tokens(given, timeout=timeout, **options)


def _opened(path: str | Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _processor(model: Model, name: str, given: Any) -> Any:
    """What makes a model's tensor."""
    entry = next((each for each in model.inputs if each.name == name), None)
    if entry is None:
        names = ", ".join(each.name for each in model.inputs) or "text or tokens"
        raise ValueError(f"model: {model.name} takes no {name}; allowed: {names}")
    if given is not None and not isinstance(given, str | Path):
        return given
    if given is not None:
        return _loaded(name, Path(given))
    if entry.preprocessor is None:
        raise ValueError(
            f"processor: the checkpoint of {model.name} says nothing of how {name} are made; "
            "allowed: one of transformers, or the folder of one"
        )
    return _from_content(name, entry.preprocessor)


def _from_content(name: str, content: Mapping[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preprocessor_config.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return _loaded(name, path.parent)


def _loaded(name: str, folder: Path) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    kinds: dict[str, Any] = {PIXELS: AutoImageProcessor, FEATURES: AutoFeatureExtractor}
    try:
        return kinds[name].from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"processor: {folder}: transformers cannot read it: {lines[0]}") from None
