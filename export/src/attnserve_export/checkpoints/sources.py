"""What models read that is no token ids: how large it is, and which token stands for what of it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attnserve_proto.manifest import ModelInput, Patches
from numpy.typing import NDArray
from torch import Tensor, nn

from attnserve_export.checkpoints.plans import EMBEDS, IDS, STATES, Source
from attnserve_export.errors import ExportError

Array = NDArray[Any]

PIXELS, FEATURES = "pixel_values", "input_features"

# A token's query has changed if any of its numbers did by more than this share of the largest.
_CHANGED = 1e-3

# Of audio feature extractors: what they compute anew from the rest.
_COMPUTED = ("mel_filters",)

Queries = Callable[[Tensor], Tensor]


def source_of(model: nn.Module, config: Any, takes: str) -> Source:
    """What a model reads.

    Args:
        model: to look for strides in.
        config: of it.
        takes: the argument's name.

    Raises:
        ExportError: the configuration does not say how large it is.
    """
    if takes == IDS:
        return Source()
    if takes == STATES:
        width = getattr(config, "cross_attention_hidden_size", None) or config.hidden_size
        return Source(STATES, ("seq_len", int(width)))
    if takes == PIXELS:
        size = getattr(config, "image_size", None)
        pair = size if isinstance(size, (list, tuple)) else (size, size)
        shape: tuple[Any, ...] = (getattr(config, "num_channels", 3), *pair)
        fields = "num_channels and image_size"
    else:
        strides = [each.stride[0] for each in model.modules() if isinstance(each, nn.Conv1d)]
        longest = getattr(config, "max_source_positions", None)
        frames = longest * math.prod(strides) if isinstance(longest, int) else None
        shape = (getattr(config, "num_mel_bins", None), frames)
        fields = "num_mel_bins and max_source_positions"
    if len(shape) != (3 if takes == PIXELS else 2) or not all(
        type(size) is int and 0 < size < 2**31 for size in shape
    ):
        raise ExportError(
            f"--checkpoint: config.json: {fields} make {takes} of [{', '.join(map(str, shape))}]; "
            "allowed: integers, 1 or more"
        )
    # How many tokens that is will be seen.
    return Source(takes, shape, tokens=1)


def embeds_of(hidden_size: int) -> Source:
    """Token embeddings in the place of ids."""
    return Source(EMBEDS, ("seq_len", hidden_size))


def random_source(source: Source, rows: int, longest: int, generator: np.random.Generator) -> Array:
    """About as large as what a preprocessor makes, [rows, ...] FP32."""
    sizes = [longest if isinstance(size, str) else size for size in source.shape]
    made: Array = generator.standard_normal((rows, *sizes), np.float32)
    return made


def with_places(source: Source, model: nn.Module, queries: Queries) -> Source:
    """A source with what its tokens stand for, found out by changing parts of it.

    Args:
        source: a picture or a sound, and its tokens.
        model: that reads it.
        queries: of the first layer, [B, H, S, D], of a batch of sources.
    """
    assert source.tokens is not None
    if source.name == FEATURES:
        ratio, left = divmod(int(source.shape[-1]), source.tokens)
        found = not left and _frames_are_tokens(source, queries, ratio)
        return replace(source, frames_per_token=ratio if found else None)
    sizes: list[tuple[int, int]] = []

    def look(_: nn.Module, given: Any, made: Tensor) -> None:
        sizes.append((made.shape[-2], made.shape[-1]))

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        queries(_random(source, 1))
    finally:
        for hook in hooks:
            hook.remove()
    for rows, columns in sizes[:1]:
        patches = (source.tokens - rows * columns, rows, columns)
        if patches[0] >= 0 and _patches_are_tokens(source, queries, patches):
            return replace(source, patches=patches)
    return source


def model_input(source: Source, preprocessor: Mapping[str, Any] | None) -> ModelInput:
    """A source for the manifest."""
    return ModelInput(
        name=source.name,
        dtype="FP32",
        shape=source.shape,
        tokens=source.tokens,
        patches=None
        if source.patches is None
        else Patches(first=source.patches[0], rows=source.patches[1], columns=source.patches[2]),
        frames_per_token=source.frames_per_token,
        preprocessor=preprocessor,
    )


def preprocessor_of(folder: Path, source: Source) -> dict[str, Any] | None:
    """What a checkpoint says of how its pictures or sounds are made; None: nothing.

    Raises:
        ExportError: a file is there and no JSON object.
    """
    kind = {PIXELS: "image_processor", FEATURES: "feature_extractor"}.get(source.name)
    if kind is None:
        return None
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ExportError(f"--checkpoint: {path}: not JSON: {error}") from None
        if not isinstance(content, dict):
            raise ExportError(f"--checkpoint: {path}: allowed: a JSON object")
        content = content.get(kind, content) if name.startswith("processor") else content
        if f"{kind}_type" in content:
            return {key: each for key, each in content.items() if key not in _COMPUTED}
    return None


def _random(source: Source, rows: int) -> Tensor:
    return torch.from_numpy(random_source(source, rows, 0, np.random.default_rng(0)))


def _patches_are_tokens(source: Source, queries: Queries, patches: tuple[int, int, int]) -> bool:
    """Whether a change of a patch alone changes its token alone."""
    first, rows, columns = patches
    _, height, width = (int(size) for size in source.shape)
    if height % rows or width % columns:
        return False
    tall, wide = height // rows, width // columns
    probed = {(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)}
    probed |= {(rows // 2, columns // 3), (rows // 3, columns // 2)}
    base = _random(source, 1)
    given = base.repeat(1 + len(probed), 1, 1, 1)
    for index, (row, column) in enumerate(sorted(probed), 1):
        place = given[index, :, row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
        place.add_(torch.linspace(1.0, 2.0, place.numel()).reshape(place.shape))
    expected = [{first + row * columns + column} for row, column in sorted(probed)]
    return _changed(queries(given)) == expected


def _frames_are_tokens(source: Source, queries: Queries, ratio: int) -> bool:
    """Whether a change of frames changes their token, and no others but its neighbours."""
    assert source.tokens is not None
    probed = sorted({0, source.tokens // 2, source.tokens - 1})
    given = _random(source, 1).repeat(1 + len(probed), 1, 1)
    for index, token in enumerate(probed, 1):
        given[index, :, token * ratio : (token + 1) * ratio] += 1.0
    changed = _changed(queries(given))
    return all(
        token in found and found <= {token - 1, token, token + 1}
        for token, found in zip(probed, changed, strict=True)
    )


def _changed(queries: Tensor) -> Sequence[set[int]]:
    """Of each source but the first: the tokens whose queries differ from the first one's."""
    largest = (queries[1:] - queries[:1]).abs().amax(dim=(1, 3))  # (B - 1, S)
    threshold = _CHANGED * float(queries.abs().max())
    return [set(row.nonzero()[:, 0].tolist()) for row in largest > threshold]
