"""Pictures, sounds and embeddings on the command line, of commands of other distributions too."""

import argparse
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from attnserve_proto.commands import values

from attnserve_client import AttentionClient
from attnserve_client._messages import RAGGED
from attnserve_client._results import Array

# By option: the argument of `attend_tokens`, the axes of one sequence, and what files may hold.
_TENSORS = {
    "--pixel-values": ("pixel_values", 3, "a picture, or .npy with [channels, height, width]"),
    "--input-features": ("input_features", 2, "a sound as .wav, or .npy with [mel bins, frames]"),
    "--inputs-embeds": ("inputs_embeds", 2, ".npy with [tokens, width]"),
    "--encoder-hidden-states": ("encoder_hidden_states", 2, ".npy with [tokens, width]"),
}


def add_tensors(parser: argparse.ArgumentParser) -> None:
    """What is read in the place of texts."""
    for option, (_, _, what) in _TENSORS.items():
        parser.add_argument(
            option,
            type=values.path,
            action="append",
            metavar="FILE",
            help=f"instead of a text: {what}; again for more",
        )
    parser.add_argument(
        "--processor",
        type=values.path,
        metavar="DIR",
        help="a folder with preprocessor_config.json; default: as the checkpoint said",
    )


def given_tensor(
    client: AttentionClient, options: argparse.Namespace
) -> dict[str, "Array | list[Array]"]:
    """The tensor that the options give, by its name; nothing if they give none.

    Raises:
        ValueError: a file cannot be read, or two kinds are given.
    """
    given = {option: getattr(options, name) for option, (name, _, _) in _TENSORS.items()}
    asked = [option for option, files in given.items() if files]
    if len(asked) > 1:
        raise ValueError(f"{', '.join(asked)}: given together; allowed: one of them")
    if not asked:
        if options.processor is not None:
            raise ValueError("--processor: given without a picture or a sound; allowed: with one")
        return {}
    [option] = asked
    name, rank, _ = _TENSORS[option]
    files: Sequence[Path] = given[option]
    if all(path.suffix == ".npy" for path in files):
        rows = [row for path in files for row in _rows(option, path, rank)]
        return {name: rows if name in RAGGED else _stacked(option, rows)}
    if name in RAGGED:
        raise ValueError(f"{option}: given {files[0]}; allowed: .npy with [tokens, width]")
    return dict(_made(client, options, option, files))


def _rows(option: str, path: Path, rank: int) -> list[Array]:
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{option}: given {path}: {error}; allowed: an array as .npy") from None
    if array.ndim not in (rank, rank + 1):
        raise ValueError(
            f"{option}: given {path} with shape {list(array.shape)}; allowed: {rank} dimensions, "
            f"or {rank + 1}, of which the first counts"
        )
    return [array] if array.ndim == rank else list(array)


def _stacked(option: str, rows: Sequence[Array]) -> Array:
    shapes = {row.shape for row in rows}
    if len(shapes) > 1:
        shown = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise ValueError(f"{option}: given shapes {shown}; allowed: one shape")
    return np.stack(rows)


def _made(
    client: AttentionClient, options: argparse.Namespace, option: str, files: Sequence[Path]
) -> dict[str, Array]:
    """What transformers makes of pictures or sounds."""
    try:
        from attnserve_client._transformers_inputs import image_inputs, sound_inputs
    except ImportError:
        raise _without_extra(option) from None
    version = getattr(options, "version", None) or ""
    model = client.get_model(options.model, version, timeout=options.timeout)
    try:
        if option == "--pixel-values":
            return image_inputs(list(files), model=model, processor=options.processor)
        sounds, rates = zip(*map(_sound, files), strict=True)
        if len(set(rates)) > 1:
            raise ValueError(f"{option}: given sounds of {sorted(set(rates))} samples a second; "
                             "allowed: of one rate")  # fmt: skip
        return sound_inputs(
            list(sounds), model=model, sampling_rate=rates[0], processor=options.processor
        )
    except ImportError:
        raise _without_extra(option) from None
    except OSError as error:
        raise ValueError(f"{option}: {error}; allowed: a file that can be read") from None


def _sound(path: Path) -> tuple[Array, int]:
    """Samples, -1..1, channels averaged, and how many there are a second."""
    try:
        with wave.open(str(path)) as file:
            channels, width, rate, count = file.getparams()[:4]
            content = file.readframes(count)
    except (OSError, EOFError, wave.Error) as error:
        raise ValueError(
            f"--input-features: given {path}: {error}; allowed: .wav of 16 bits, or .npy"
        ) from None
    if width != 2:
        raise ValueError(
            f"--input-features: given {path} of {8 * width} bits a sample; allowed: 16 bits"
        )
    samples = np.frombuffer(content, "<i2").reshape(-1, channels)
    return samples.mean(axis=1, dtype=np.float32) / np.float32(1 << 15), rate


def _without_extra(option: str) -> ValueError:
    return ValueError(
        f"{option}: making it needs transformers and Pillow: `pip install "
        "'attnserve-client[transformers]'`; allowed without: .npy"
    )
