"""Loaded models: a manifest, its graphs, and the choice between them."""

import logging
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import attnserve_kernels

from attnserve_server.engine.providers import Providers
from attnserve_server.engine.session import GraphSession
from attnserve_server.engine.tokenizer import TextTokenizer
from attnserve_server.errors import NotFoundError, PreconditionError, UnloadedError
from attnserve_server.repository import check_files, find, read
from attnserve_server.repository.manifest import Manifest, ManifestError, VariantEntry

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Variant:
    """One graph of a model, loaded."""

    entry: VariantEntry
    session: GraphSession

    @property
    def name(self) -> str:
        """As in the manifest."""
        return self.entry.name

    def can(self, inputs: Collection[str], outputs: Collection[str]) -> bool:
        """Whether its graph takes and gives these."""
        session = self.session
        return session.inputs.issuperset(inputs) and set(session.outputs).issuperset(outputs)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One version of a model, ready to run."""

    manifest: Manifest
    variants: tuple[Variant, ...]
    tokenizer: TextTokenizer | None
    provider: str

    def preferred(self, length: int) -> list[Variant]:
        """All variants, those first that the manifest picks for a length on this provider."""
        rows = self.manifest.picks.get(self.provider, ())
        for row in rows:
            if row.up_to is None or length <= row.up_to:
                rank = {name: index for index, name in enumerate(row.variants)}
                return sorted(self.variants, key=lambda v: rank.get(v.name, len(rank)))
        return list(self.variants)

    def find(self, inputs: Collection[str], outputs: Collection[str]) -> Variant | None:
        """A variant that takes and gives these, if there is one."""
        return next((variant for variant in self.variants if variant.can(inputs, outputs)), None)

    def choose(
        self, forced: str, inputs: Collection[str], outputs: Collection[str], length: int
    ) -> Variant:
        """The preferred variant that takes what is given and gives what is wanted.

        Args:
            length: the longer of Sq and Sk.
            forced: the variant asked for by name; empty: any.
            inputs: graph inputs that the request gives.
            outputs: graph outputs that it needs.

        Raises:
            NotFoundError: no variant has the name asked for.
            PreconditionError: no variant, or not the one asked for, can do it.
        """
        candidates = [v for v in self.preferred(length) if forced in ("", v.name)]
        what = f"model {self.manifest.name} version {self.manifest.version}"
        if not candidates:
            known = ", ".join(variant.name for variant in self.variants)
            raise NotFoundError(f"variant: given {forced!r}; {what} has: {known}")
        for variant in candidates:
            if variant.can(inputs, outputs):
                return variant
        lacking = _lacking(candidates, inputs, outputs)
        which = f"variant {forced!r} of {what}" if forced else what
        raise PreconditionError(f"{which} cannot do this: {lacking}")


def _lacking(candidates: list[Variant], inputs: Collection[str], outputs: Collection[str]) -> str:
    taken = sorted(set(inputs) - set().union(*(v.session.inputs for v in candidates)))
    given = sorted(set(outputs) - set().union(*(v.session.outputs for v in candidates)))
    parts = [f"it takes no {', '.join(taken)}"] if taken else []
    if given:
        parts.append(f"it gives no {', '.join(given)}")
    return "; ".join(parts) or "no single variant takes and gives all of it"


@dataclass(frozen=True, slots=True)
class _Models:
    """What a store holds at one moment."""

    loaded: Mapping[tuple[str, int], LoadedModel]
    latest: Mapping[str, int]
    unloaded: frozenset[str]


class ModelStore:
    """All loaded models, by name and version.

    Reading takes no lock: a change puts a whole new mapping in the place of the old one, and who
    holds a model goes on with it.
    """

    def __init__(self, models: Mapping[tuple[str, int], LoadedModel]) -> None:
        self._now = _models(models, frozenset())
        self._generation = 0
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(self._now.loaded.values())

    @property
    def generation(self) -> int:
        """How often what is loaded has changed."""
        return self._generation

    def versions(self, name: str) -> list[int]:
        """The loaded versions of a model, lowest first."""
        return [version for other, version in self._now.loaded if other == name]

    def get(self, name: str, version: str) -> LoadedModel:
        """A model by name and version; an empty version is the highest.

        Raises:
            NotFoundError: there is none.
            UnloadedError: it was unloaded.
        """
        now = self._now
        latest = now.latest.get(name)
        if latest is None:
            if name in now.unloaded:
                raise UnloadedError(f"model: {name} is unloaded; load it, or call another")
            known = ", ".join(now.latest) or "none"
            raise NotFoundError(f"model: given {name!r}; models here: {known}")
        if not version:
            return now.loaded[name, latest]
        # At most as many digits as a version may have: int() takes no end of them.
        plain = version.isascii() and version.isdigit() and len(version) <= 19
        number = int(version) if plain else 0
        model = now.loaded.get((name, number))
        if model is None:
            known = ", ".join(str(v) for n, v in now.loaded if n == name)
            raise NotFoundError(f"version: given {version[:80]!r}; versions of {name}: {known}")
        return model

    def put(self, name: str, models: Iterable[LoadedModel]) -> None:
        """Have these versions of a model and no others; with none, it is unloaded."""
        versions = {(name, model.manifest.version): model for model in models}
        with self._lock:
            others = {at: model for at, model in self._now.loaded.items() if at[0] != name}
            unloaded = self._now.unloaded - {name} if versions else self._now.unloaded | {name}
            self._now = _models(others | versions, unloaded)
            self._generation += 1


def _models(loaded: Mapping[tuple[str, int], LoadedModel], unloaded: frozenset[str]) -> _Models:
    in_order = dict(sorted(loaded.items(), key=lambda item: item[0]))
    return _Models(in_order, dict(in_order.keys()), unloaded)


def load_all(
    repository: Path, providers: Providers, *, intra_op_threads: int, spinning: bool
) -> ModelStore:
    """Load every version of every model.

    Raises:
        ManifestError: a version's files are not what its manifest says, or do not load.
    """
    models: dict[tuple[str, int], LoadedModel] = {}
    for folder in find(repository):
        model = load(folder, providers, intra_op_threads=intra_op_threads, spinning=spinning)
        if model is not None:
            models[model.manifest.name, model.manifest.version] = model
    return ModelStore(models)


def load(
    folder: Path, providers: Providers, *, intra_op_threads: int, spinning: bool
) -> LoadedModel | None:
    """Load one version of a model; None if none of its variants can run here.

    Raises:
        ManifestError: its files are not what its manifest says, or do not load.
    """
    started = time.monotonic()
    manifest = read(folder)
    check_files(folder, manifest)
    variants = []
    for entry in manifest.variants:
        if entry.native and attnserve_kernels.library_path() is None:
            reason = "attnserve-kernels was installed without its operators"
        elif not set(entry.providers) & set(providers.names):
            reason = f"it suits {', '.join(entry.providers)}"
        else:
            reason = ""
        if reason:
            _log.info(
                "variant left out",
                extra={"model": manifest.name, "variant": entry.name, "reason": reason},
            )
            continue
        try:
            session = GraphSession(
                folder / entry.file,
                providers,
                intra_op_threads=intra_op_threads,
                spinning=spinning,
            )
        except Exception as error:  # ONNX Runtime raises many kinds
            raise ManifestError(f"{folder / entry.file}: does not load: {error}") from None
        variants.append(Variant(entry, session))
    tokenizer = _tokenizer(folder / manifest.tokenizer) if manifest.tokenizer else None
    _log.info(
        "model loaded",
        extra={
            "model": manifest.name,
            "version": manifest.version,
            "variants": [variant.name for variant in variants],
            "seconds": round(time.monotonic() - started, 3),
        },
    )
    if not variants:
        return None
    return LoadedModel(manifest, tuple(variants), tokenizer, providers.names[0])


def _tokenizer(path: Path) -> TextTokenizer:
    try:
        return TextTokenizer(path)
    except Exception as error:  # tokenizers raises plain ones
        raise ManifestError(f"{path}: does not load: {error}") from None
