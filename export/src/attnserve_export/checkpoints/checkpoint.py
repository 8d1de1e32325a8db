"""A checkpoint's folder, read: configuration and parameters."""

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from attnserve_export.checkpoints.experts import every_expert
from attnserve_export.checkpoints.families import Family, check_rules, family_of
from attnserve_export.checkpoints.files import read_json
from attnserve_export.checkpoints.masks import make_mask
from attnserve_export.checkpoints.plans import IDS, STATES
from attnserve_export.checkpoints.sentences import Sentences, read_sentences
from attnserve_export.checkpoints.tracing import IMPLEMENTATION, attention
from attnserve_export.errors import ExportError

# Of a model whose attention cannot be replaced.
NOT_THROUGH = "--checkpoint: its attention does not go through AttentionInterface"

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that can be exported.

    Attributes:
        folder: where the files of transformers are: of sentence-transformers, within its own.
        name: as its config.json has it, or its family's.
        family: of the checkpoint.
        whole: configuration of the whole, as transformers reads it.
        sentences: what sentence-transformers' files say of it; None: there are none.
    """

    folder: Path
    name: str
    family: Family
    whole: Any
    sentences: Sentences | None

    @property
    def config(self) -> Any:
        """Of what is exported: of the whole, or of a part."""
        return self.family.config

    @property
    def vocab_size(self) -> int:
        """Of its tokens; 0 if it has none."""
        return int(getattr(self.config.get_text_config(), "vocab_size", 0) or 0)

    @property
    def pad_token_id(self) -> int:
        """What to fill up sequences with; any id will do, as nothing sees it."""
        given = getattr(self.config.get_text_config(), "pad_token_id", None)
        return given if isinstance(given, int) and 0 <= given < self.vocab_size else 0

    @property
    def decoder_start_token_id(self) -> int | None:
        """What a target starts with; None: there are no targets."""
        if not self.family.two_stacks and self.family.takes != STATES:
            return None
        named = ("decoder_start_token_id", *(() if self.family.two_stacks else ("bos_token_id",)))
        given = (getattr(self.whole, name, None) for name in named)
        return next((int(start) for start in given if start is not None), self.pad_token_id)


def read_checkpoint(folder: Path, part: str = "") -> Checkpoint:
    """Read a checkpoint's configuration.

    Args:
        folder: of transformers, or of sentence-transformers.
        part: that is to be exported, of `parts.PARTS`; empty: what config.json says.

    Raises:
        ExportError: it cannot be read, or is of a kind that is not supported; says which field of
            which file, what it is and what is allowed.
    """
    sentences = read_sentences(folder)
    if sentences is not None:
        folder = sentences.inner
    content = read_json(folder / "config.json")
    if not isinstance(content, dict):
        raise ExportError(f"--checkpoint: {folder}: config.json: allowed: a JSON object")
    check_rules(content, str(folder))
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        raise ExportError(
            f"--checkpoint: {folder}: {WEIGHTS} and {INDEX} are missing; allowed: parameters as "
            "safetensors (pickled ones are never loaded)"
        )
    config_class = getattr(_transformers(), "AutoConfig")  # noqa: B009 (typed as missing)
    try:
        config = config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise ExportError(
            f"--checkpoint: {folder}: config.json: transformers cannot read it: {error}"
        ) from None
    family = family_of(config, content, str(folder), part)
    has_tokens = family.takes in (IDS, STATES) or family.two_stacks
    _check_numbers(family.config, str(folder), has_tokens=has_tokens)
    name = str(content.get("_name_or_path") or family.name)
    # Trained from a folder, it would say where that was.
    name = Path(name).name if Path(name).is_absolute() else name
    return Checkpoint(folder, name, family, config, sentences)


def load_model(
    checkpoint: Checkpoint, implementation: str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model with its parameters, in evaluation mode.

    They are read one by one: no more than a few are in memory besides those that are read already.

    Args:
        checkpoint: to load.
        implementation: of its attention: "eager", or `tracing.IMPLEMENTATION`.
        dtype: of its parameters, but for those that transformers keeps in FP32.

    Raises:
        ExportError: the parameters do not fit the configuration.
    """
    transformers = _transformers()
    transformers.AttentionInterface.register(IMPLEMENTATION, attention)
    transformers.AttentionMaskInterface.register(IMPLEMENTATION, make_mask)
    _experts_interface().register(IMPLEMENTATION, every_expert)
    model_class = checkpoint.family.model_class
    arguments: dict[str, Any] = {}
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        arguments["add_pooling_layer"] = False
    try:
        with _parameters(checkpoint.folder) as parameters:
            model, info = model_class.from_pretrained(
                None,
                config=copy.deepcopy(checkpoint.whole),
                state_dict=parameters,
                attn_implementation=implementation,
                experts_implementation=implementation,
                dtype=dtype,
                output_loading_info=True,
                **arguments,
            )
    except Exception as error:  # transformers and safetensors raise many kinds
        if isinstance(error, KeyError) and error.args == (IMPLEMENTATION,):
            raise ExportError(NOT_THROUGH) from None
        text = str(error).strip().splitlines()
        raise ExportError(
            f"--checkpoint: {checkpoint.folder}: its parameters cannot be loaded: "
            f"{text[0] if text else type(error).__name__}"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ExportError(
            f"--checkpoint: {checkpoint.folder}: parameters are missing: "
            f"{', '.join(missing[:3])}{more}"
        )
    module: nn.Module = model.eval()
    return module.get_submodule(checkpoint.family.path)


@contextlib.contextmanager
def _parameters(folder: Path) -> Iterator[dict[str, Any]]:
    """All parameters in a folder, by name, each of which is read when it is asked for."""
    if (folder / WEIGHTS).is_file():
        shards = [WEIGHTS]
    else:
        shards = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    with contextlib.ExitStack() as stack:
        slices: dict[str, Any] = {}
        for shard in shards:
            # Not mapped: what has been read would count as this process's memory.
            opened = safe_open(folder / shard, framework="pt", backend="pread")
            file = stack.enter_context(opened)
            slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        yield slices


def weights_sha256(folder: Path) -> str:
    """The SHA-256 of the safetensors files, in hex: of all of them in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _check_numbers(config: Any, where: str, *, has_tokens: bool) -> None:
    """Refuse what transformers reads without complaint, but what no model can be.

    Args:
        config: as transformers reads it.
        where: the folder, for errors.
        has_tokens: whether there must be a vocabulary.

    Raises:
        ExportError: with the field.
    """
    text = config.get_text_config()
    fields = {"vocab_size": getattr(text, "vocab_size", None)} if has_tokens else {}
    for name in ("hidden_size", "max_position_embeddings"):
        if hasattr(text, name):
            fields[name] = getattr(text, name)
    if "roberta" in str(config.model_type):  # whose positions are counted from it
        fields["pad_token_id"] = getattr(text, "pad_token_id", None)
    for name, value in fields.items():
        if type(value) is not int or not 0 <= value < 2**31:
            raise ExportError(
                f"--checkpoint: {where}: config.json: {name} is {value!r}; "
                f"allowed: an integer, 0..{2**31 - 1}"
            )


def _experts_interface() -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


def _transformers() -> Any:
    # Imported here: core and layer exports do without transformers.
    try:
        import transformers
    except ImportError:
        raise ExportError(
            "transformers is not installed; `pip install 'attnserve-export[transformers]'`"
        ) from None
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers
