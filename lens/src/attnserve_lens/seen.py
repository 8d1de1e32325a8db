"""What a model saw or heard, as a page shows it under its attention: pictures, spectrograms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from attnserve_client import ModelInput, Patches, TokensResult
from numpy.typing import NDArray

from attnserve_lens.attention import Array

Bytes = NDArray[np.uint8]

# What transformers' image processors take for granted where their configuration is silent.
_RESCALE = 1 / 255


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture whose patches are tokens.

    Attributes:
        pixels: [height, width, 3].
        patches: which tokens those are.
    """

    pixels: Bytes
    patches: Patches


@dataclass(frozen=True, slots=True)
class Sound:
    """A spectrogram whose frames become tokens.

    Attributes:
        levels: [mel bins, frames], 0 the quietest, the lowest bin first.
        frames_per_token: of them.
        seconds_per_frame: None: not known.
    """

    levels: Bytes
    frames_per_token: int
    seconds_per_frame: float | None


def seen(result: Any, sequence: int) -> Picture | Sound | None:
    """What the source tokens of a sequence stand for, if that can be shown.

    Args:
        result: of `attend_tokens` or another.
        sequence: which one of the batch.
    """
    if not isinstance(result, TokensResult) or result.source is None or result.given is None:
        return None
    source, given = result.source, np.asarray(result.given[sequence], np.float32)
    if source.patches is not None:
        return Picture(_pixels(given, source.preprocessor or {}), source.patches)
    if source.frames_per_token is not None:
        return Sound(_stretched(given), source.frames_per_token, _seconds_per_frame(source))
    return None


def described(shown: Picture | Sound, block: str) -> dict[str, Any]:
    """What the page's script must know of it.

    Args:
        shown: that.
        block: the name of the block with its bytes.
    """
    if isinstance(shown, Picture):
        height, width, _ = shown.pixels.shape
        patches = {name: getattr(shown.patches, name) for name in ("first", "rows", "columns")}
        return {"kind": "picture", "block": block, "height": height, "width": width, **patches}
    bins, frames = shown.levels.shape
    return {
        "kind": "sound",
        "block": block,
        "bins": bins,
        "frames": frames,
        "frames_per_token": shown.frames_per_token,
        "seconds_per_frame": shown.seconds_per_frame,
    }


def content_of(shown: Picture | Sound) -> bytes:
    """The bytes of its block: [height, width, 3] or [mel bins, frames]."""
    return (shown.pixels if isinstance(shown, Picture) else shown.levels).tobytes()


def _pixels(values: Array, preprocessor: Mapping[str, Any]) -> Bytes:
    """[channels, height, width] as the model read it to [height, width, 3] as eyes do."""
    channels = len(values)
    mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    known = all(isinstance(each, list) and len(each) == channels for each in (mean, std))
    if known and preprocessor.get("do_normalize", True):
        spread, middle = (np.asarray(each, np.float32)[:, None, None] for each in (std, mean))
        values = values * spread + middle
        factor = preprocessor.get("rescale_factor", _RESCALE)
        scale = 1 / factor if preprocessor.get("do_rescale", True) else 1.0
        shown = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
    else:
        shown = _stretched(values)
    colours = shown if channels == 3 else np.repeat(shown[:1], 3, axis=0)
    return np.ascontiguousarray(colours.transpose(1, 2, 0))


def _stretched(values: Array) -> Bytes:
    """From the lowest, 0, to the highest, 255."""
    low, high = float(values.min()), float(values.max())
    return np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _seconds_per_frame(source: ModelInput) -> float | None:
    said = source.preprocessor or {}
    hop, rate = said.get("hop_length"), said.get("sampling_rate")
    if not all(isinstance(each, int) and each > 0 for each in (hop, rate)):
        return None
    assert hop is not None
    assert rate is not None
    return float(hop / rate)
