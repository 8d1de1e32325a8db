"""What a folder of sentence-transformers says of texts and of their vectors.

Its files decide more than transformers' own: how long texts may be, what comes before them, and
what is made of the hidden states. Each key is read, or refused by its name: it is not left to those
who compare embeddings later to find out. As in sentence-transformers 6.2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnserve_export.checkpoints.files import read_json
from attnserve_export.errors import ExportError

MODULES = "modules.json"

# Names that sentence-transformers has given to the settings of its first module, newest first.
_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_PROMPTS = "config_sentence_transformers.json"

# What it calls the ways to pool, in both of its forms, and what manifests call them.
_POOLINGS = {
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "last",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_DIMENSIONS = ("word_embedding_dimension", "embedding_dimension")

# Arguments of a model's loading that change nothing of what it computes in FP32.
_HARMLESS = frozenset(
    ("torch_dtype", "dtype", "attn_implementation", "device_map", "low_cpu_mem_usage",
     "use_safetensors", "add_pooling_layer", "trust_remote_code", "cache_dir", "token")
)  # fmt: skip


@dataclass(frozen=True)
class Sentences:
    """What those files say.

    Attributes:
        inner: the folder of the transformer itself.
        pooling: one of the manifest's; None: it is not supported.
        refused: what is not supported of the pooling, and what is; empty: all of it is.
        width: of the vectors that are pooled, as the pooling's settings say; None: they do not.
        normalize: whether the pooled vector is scaled to length 1.
        max_len: tokens that a text is cut to; None: as the tokenizer has it.
        lowercase: whether texts are lowercased first.
        tokenizer_options: of `AutoTokenizer.from_pretrained`.
        prompt: what comes before every text.
        other_prompts: names of those that callers put there themselves.
        prompt_pooled: whether the prompt's tokens count for the pooled vector.
    """

    inner: Path
    pooling: str | None = None
    refused: str = ""
    width: int | None = None
    normalize: bool = False
    max_len: int | None = None
    lowercase: bool = False
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = ""
    other_prompts: tuple[str, ...] = ()
    prompt_pooled: bool = True

    def refused_of(self, hidden_size: int) -> str:
        """What is not supported of the pooling of a model of that width; empty: all of it is."""
        if self.refused or self.width in (None, hidden_size):
            return self.refused
        return f"its pooling is of {self.width} numbers, and the hidden states have {hidden_size}"


def read_sentences(folder: Path) -> Sentences | None:
    """What a folder's files say; None: they are not sentence-transformers'.

    Raises:
        ExportError: a setting is not supported, or cannot be read; names the file and the key.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = _modules(folder)
    inner = folder
    if modules and modules[0].kind == "Transformer":
        inner = folder / modules[0].path
    settings = _settings(inner)
    prompts = _prompts(folder)
    try:
        pooled = _pooling(folder, modules)
    except _NotSupportedError as error:
        pooled = {"refused": str(error)}
    return Sentences(inner=inner, **prompts, **pooled, **settings)


class _NotSupportedError(Exception):
    """Vectors that are made in another way than is supported; the message says which is."""


@dataclass(frozen=True)
class _Module:
    kind: str
    path: str


def _modules(folder: Path) -> list[_Module]:
    content = read_json(folder / MODULES)
    if not isinstance(content, list) or not all(isinstance(each, Mapping) for each in content):
        raise ExportError(f"--checkpoint: {folder / MODULES}: allowed: a list of modules")
    found = []
    for entry in content:
        named, path = str(entry.get("type", "")), str(entry.get("path", ""))
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ExportError(
                f"--checkpoint: {folder / MODULES}: path is {path!r}; allowed: one within it"
            )
        own = named.startswith("sentence_transformers.")
        found.append(_Module(named.rsplit(".", 1)[-1] if own else named, path))
    return found


def _pooling(folder: Path, modules: Sequence[_Module]) -> dict[str, Any]:
    """Attributes of `Sentences` about the vector of a text."""
    # Dropout does nothing once a model is trained.
    kinds = [module.kind for module in modules if module.kind != "Dropout"]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _NotSupportedError(
            f"{MODULES} has {', '.join(kinds) or 'no modules'}; supported: Transformer, Pooling "
            "and, after them, Normalize"
        )
    pooling = next(module for module in modules if module.kind == "Pooling")
    for module in modules:
        path = folder / module.path / "config.json"
        if module.kind == "Normalize" and path.is_file():
            _check_normalize(f"{module.path}/config.json", read_json(path))
    path = folder / pooling.path / "config.json"
    where = f"{pooling.path}/config.json"
    if not path.is_file():
        raise _NotSupportedError(f"{where} is not there; supported: one that names a way to pool")
    config = read_json(path)
    unknown = set(config) - {"pooling_mode", "include_prompt", *_DIMENSIONS, *_FLAGS}
    if unknown:
        name = min(unknown)
        raise _NotSupportedError(f"{where}: {name} is {config[name]!r}; supported: not there")
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for flag, name in _FLAGS.items() if config.get(flag)] or ["mean"]
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        given = " with ".join(map(str, modes))
        raise _NotSupportedError(
            f"{where} pools by {given}; supported: one of {', '.join(_POOLINGS)}"
        )
    return {
        "pooling": _POOLINGS[modes[0]],
        "width": next((config[key] for key in _DIMENSIONS if key in config), None),
        "normalize": "Normalize" in kinds,
        "prompt_pooled": config.get("include_prompt") is not False,
    }


def _check_normalize(where: str, config: Mapping[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise _NotSupportedError(
                f"{where}: {key} is {config[key]!r}; supported: 'sentence_embedding'"
            )


def _prompts(folder: Path) -> dict[str, Any]:
    """Attributes of `Sentences` about what comes before texts."""
    path = folder / _PROMPTS
    if not path.is_file():
        return {}
    config = read_json(path)
    if config.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise _refused(path, "model_type", config["model_type"], "'SentenceTransformer'")
    name, prompts = config.get("default_prompt_name"), config.get("prompts") or {}
    if name is not None and name not in prompts:
        raise _refused(path, "default_prompt_name", name, f"one of {sorted(prompts)}")
    return {
        "prompt": str(prompts.get(name) or ""),
        "other_prompts": tuple(sorted(n for n, text in prompts.items() if text and n != name)),
    }


def _settings(inner: Path) -> dict[str, Any]:
    """Attributes of `Sentences` from the settings of the first module."""
    path = next((inner / name for name in _SETTINGS if (inner / name).is_file()), None)
    if path is None:
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise ExportError(f"--checkpoint: {path}: allowed: a JSON object")
    for old, new in (
        ("tokenizer_args", "processor_kwargs"),
        ("model_args", "model_kwargs"),
        ("config_args", "config_kwargs"),
    ):
        if old in config:
            config[new] = config.pop(old)
    for key, value in config.items():
        allowed, fits = _ALLOWED.get(key, ("not there", lambda value: False))
        if not fits(value):
            raise _refused(path, key, value, allowed)
    options = {
        key: value
        for key, value in (config.get("processor_kwargs") or {}).items()
        if key not in _HARMLESS
    }
    return {
        # The tokenizer's own option wins, as there.
        "max_len": options.pop("model_max_length", config.get("max_seq_length")),
        "lowercase": bool(config.get("do_lower_case")),
        "tokenizer_options": options,
    }


def _refused(path: Path, key: str, value: object, allowed: str) -> ExportError:
    return ExportError(
        f"--checkpoint: {path.parent}: {path.name}: {key} is {value!r}; allowed: {allowed}"
    )


def _is_text_alone(value: Any) -> bool:
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    return value in (None, {"text": text})


def _is_length(value: Any) -> bool:
    return value is None or (type(value) is int and value > 0)


# What each setting may be: in words, and as a function of its value.
_ALLOWED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "max_seq_length": ("an integer above 0, or null", _is_length),
    "do_lower_case": ("true, false", lambda value: value in (True, False, None)),
    "transformer_task": ("'feature-extraction'", lambda v: v in (None, "feature-extraction")),
    "modality_config": ("texts alone, by `forward`", _is_text_alone),
    "module_output_name": ("'token_embeddings'", lambda v: v in (None, "token_embeddings")),
    "processor_kwargs": (
        "an object",
        lambda v: v is None or (isinstance(v, dict) and _is_length(v.get("model_max_length"))),
    ),
    "model_kwargs": (
        f"an object with {', '.join(sorted(_HARMLESS))}",
        lambda v: v is None or (isinstance(v, dict) and set(v) <= _HARMLESS),
    ),
    "config_kwargs": (
        "empty: it would be another model",
        lambda v: not v or (isinstance(v, dict) and set(v) <= _HARMLESS),
    ),
    "processing_kwargs": ("empty", lambda value: not value),
    "query_expansion": ("null: texts are taken as they are", lambda value: value is None),
    # Of tasks that only `encode_query` and `encode_document` name.
    "query_length": ("an integer above 0, or null", _is_length),
    "document_length": ("an integer above 0, or null", _is_length),
    "unpad_inputs": ("true, false, or null", lambda value: value in (True, False, None)),
}
