"""Loaded models: a manifest, its graphs in the data plane, and its tokenizer."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import attnserve_kernels
from attnserve_dataplane import DataPlane, Model, ModelFacts, Pick, VariantFacts
from attnserve_proto.manifest import Manifest, ManifestError, VariantEntry, parse, read_text

from attnserve_server.models import graphs
from attnserve_server.models.providers import Providers
from attnserve_server.models.tokenizer import TextTokenizer
from attnserve_server.repository import check_files, check_unchanged, explain_empty, find

_log = logging.getLogger(__name__)

PAGED = "paged"
"""The variant that Decode runs, and nothing else."""


class CannotRunError(ManifestError):
    """None of a version's variants suits this server."""


Loader = Callable[[Path], "LoadedModel | None"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One graph of a model, loaded; inputs and outputs as the graph has them."""

    entry: VariantEntry
    inputs: frozenset[str]
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        """As in the manifest."""
        return self.entry.name


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One version of a model, ready to run.

    Attributes:
        manifest_json: its manifest as it is written.
        core: the same in the data plane, which runs it.
        provider: of ONNX Runtime, preferred.
    """

    manifest: Manifest
    manifest_json: str
    core: Model
    variants: tuple[Variant, ...]
    tokenizer: TextTokenizer | None
    provider: str

    @property
    def attending(self) -> tuple[Variant, ...]:
        """Those that attend to the keys of a request, not to those of a session."""
        return tuple(variant for variant in self.variants if variant.name != PAGED)

    def variant(self, name: str) -> Variant:
        """A variant by its name, which must be one of the model's."""
        return next(variant for variant in self.variants if variant.name == name)


class ModelStore:
    """What is loaded, for the control plane; the data plane has the same models and says which one
    a request means. Safe to call from several threads.
    """

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._loaded: dict[tuple[str, int], LoadedModel] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter([model for _, model in sorted(self._loaded.items(), key=lambda item: item[0])])

    def versions(self, name: str) -> list[int]:
        """The loaded versions of a model, lowest first."""
        return sorted(version for other, version in self._loaded if other == name)

    def get(self, name: str, version: str) -> LoadedModel:
        """A model by name and version; an empty version is the highest.

        Raises:
            attnserve_dataplane.RequestError: there is none, or it was unloaded.
        """
        while True:
            core = self._plane.get_model(name, version)
            if model := self._loaded.get((core.name, core.version)):
                return model  # else it was unloaded meanwhile, and the data plane says so

    def put(self, name: str, models: Iterable[LoadedModel], reason: str = "") -> None:
        """Have these versions of a model and no others.

        With none, requests for it are told the reason; without one, that it is unloaded.
        """
        versions = {(name, model.manifest.version): model for model in models}
        with self._lock:
            others = {at: model for at, model in self._loaded.items() if at[0] != name}
            # The data plane's models are always here too.
            self._loaded = self._loaded | versions
            cores = [model.core for model in versions.values()]
            self._plane.put_models(name, cores, reason)
            self._loaded = others | versions


def load_all(repository: Path, store: ModelStore, load: Loader) -> dict[tuple[str, int], str]:
    """Load every version of every model, but those that do not load.

    Returns:
        By name and version, why those do not.

    Raises:
        ManifestError: `repository` is not a folder, or all that is in it is damaged.
    """
    models: dict[str, list[LoadedModel]] = {}
    failed: dict[tuple[str, int], str] = {}
    damaged: list[str] = []
    for folder in find(repository):
        name, version = folder.parent.name, int(folder.name)
        found = models.setdefault(name, [])
        try:
            found.append(loaded(folder, repository, load))
        except ManifestError as error:
            failed[name, version] = str(error)
            damaged += [] if isinstance(error, CannotRunError) else [str(error)]
            _log.error(
                "model not loaded",
                extra={"model": name, "version": version, "reason": str(error)},
            )
    if damaged and not any(models.values()):
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise ManifestError(f"no model loads: {damaged[0]}{more}")
    for name, versions in models.items():
        reasons = [why for (other, _), why in failed.items() if other == name]
        store.put(name, versions, reasons[-1] if reasons else "")
    if not models:
        _log.warning("no model found", extra={"reason": explain_empty(repository)})
    return failed


def loaded(folder: Path, repository: Path, load: Loader) -> LoadedModel:
    """One version of a model.

    Raises:
        CannotRunError: its files are as they should be, but none of it can run here.
        ManifestError: it does not load; says why, with paths within the repository: callers need
            not know where that is.
    """
    try:
        model = load(folder)
    except MemoryError:
        raise ManifestError(f"{folder.relative_to(repository)}: no memory is left for it") from None
    except (ManifestError, OSError) as error:
        kind = type(error) if isinstance(error, ManifestError) else ManifestError
        raise kind(str(error).replace(f"{repository}/", "")) from None
    if model is None:
        where = folder.relative_to(repository)
        raise CannotRunError(f"{where}: no variant can run on this server")
    return model


def load(folder: Path, plane: DataPlane, providers: Providers) -> LoadedModel | None:
    """Load one version of a model; None if none of its variants can run here.

    Raises:
        ManifestError: its files are not what its manifest says, or do not load.
    """
    started = time.monotonic()
    manifest_json = read_text(folder)
    manifest = parse(folder, manifest_json)
    compared = check_files(folder, manifest)
    entries = [entry for entry in manifest.variants if _can_run(entry, manifest, providers)]
    if not entries:
        return None
    try:
        core = plane.load(
            _facts(manifest),
            [
                VariantFacts(
                    name=entry.name,
                    path=str(folder / entry.file),
                    quadratic=entry.memory == "quadratic",
                    native=entry.native,
                )
                for entry in entries
            ],
            [
                Pick(up_to=pick.up_to, variants=list(pick.variants))
                for pick in manifest.picks.get(providers.names[0], ())
            ],
        )
    except RuntimeError as error:
        raise ManifestError(str(error)) from None
    graphs.check(folder, manifest, entries, core)
    variants = tuple(
        Variant(entry, frozenset(core.inputs(entry.name)), tuple(core.outputs(entry.name)))
        for entry in entries
    )
    tokenizer = _tokenizer(folder, manifest)
    check_unchanged(folder, compared)
    _log.info(
        "model loaded",
        extra={
            "model": manifest.name,
            "version": manifest.version,
            "variants": [variant.name for variant in variants],
            "seconds": round(time.monotonic() - started, 3),
        },
    )
    return LoadedModel(manifest, manifest_json, core, variants, tokenizer, providers.names[0])


def _can_run(entry: VariantEntry, manifest: Manifest, providers: Providers) -> bool:
    if entry.native and attnserve_kernels.library_path() is None:
        reason = "attnserve-kernels was installed without its operators"
    elif not set(entry.providers) & set(providers.names):
        reason = f"it suits {', '.join(entry.providers)}"
    else:
        return True
    _log.info(
        "variant left out",
        extra={"model": manifest.name, "variant": entry.name, "reason": reason},
    )
    return False


def _facts(manifest: Manifest) -> ModelFacts:
    """What the data plane must know of a model."""
    attention = manifest.attention
    facts = ModelFacts()
    facts.name, facts.version = manifest.name, manifest.version
    facts.kind, facts.dtype = manifest.kind, manifest.dtype
    facts.num_heads, facts.num_kv_heads = attention.num_heads, attention.num_kv_heads
    facts.head_dim, facts.value_head_dim = attention.head_dim, attention.value_head_dim
    facts.set_mask(attention.mask)
    facts.window, facts.window_right = attention.window, attention.window_right
    facts.bottom_right = attention.alignment == "bottom-right"
    facts.scale, facts.softcap = attention.scale, attention.softcap
    facts.sinks = list(attention.sinks or ())
    if manifest.layer is not None:
        facts.embed_dim = manifest.layer.embed_dim
        facts.context_dim = manifest.layer.context_dim
    if manifest.transformer is not None:
        facts.pad_token_id = manifest.transformer.pad_token_id
        facts.hidden_size = manifest.transformer.hidden_size
    return facts


def _tokenizer(folder: Path, manifest: Manifest) -> TextTokenizer | None:
    if manifest.tokenizer is None or manifest.transformer is None:
        return None
    path = folder / manifest.tokenizer
    try:
        return TextTokenizer(path, manifest.transformer.texts)
    except Exception as error:  # tokenizers raises plain ones
        raise ManifestError(f"{path}: does not load: {error}") from None
