"""Loaded models: a manifest, its graphs, and the choice between them."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import attnserve_kernels

from attnserve_server.engine.providers import Providers
from attnserve_server.engine.session import GraphSession
from attnserve_server.engine.tokenizer import TextTokenizer
from attnserve_server.errors import NotFoundError, PreconditionError
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
        for variant in self.variants:
            if variant.session.inputs.issuperset(inputs) and set(variant.session.outputs) >= set(
                outputs
            ):
                return variant
        return None

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
            if variant.session.inputs.issuperset(inputs) and set(variant.session.outputs) >= set(
                outputs
            ):
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


class ModelStore:
    """All loaded models, by name and version."""

    def __init__(self, models: Mapping[tuple[str, int], LoadedModel]) -> None:
        self._models = dict(sorted(models.items()))
        self._latest = dict(self._models.keys())

    @property
    def generation(self) -> int:
        """Changes whenever a model is loaded or unloaded."""
        return 0

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(self._models.values())

    def get(self, name: str, version: str) -> LoadedModel:
        """A model by name and version; an empty version is the highest.

        Raises:
            NotFoundError: there is none.
        """
        latest = self._latest.get(name)
        if latest is None:
            known = ", ".join(self._latest) or "none"
            raise NotFoundError(f"model: given {name!r}; models here: {known}")
        if not version:
            return self._models[name, latest]
        # At most as many digits as a version may have: int() takes no end of them.
        plain = version.isascii() and version.isdigit() and len(version) <= 19
        number = int(version) if plain else 0
        model = self._models.get((name, number))
        if model is None:
            known = ", ".join(str(v) for n, v in self._models if n == name)
            raise NotFoundError(f"version: given {version[:80]!r}; versions of {name}: {known}")
        return model


def load_all(
    repository: Path, providers: Providers, *, intra_op_threads: int, spinning: bool
) -> ModelStore:
    """Load every version of every model.

    Raises:
        ManifestError: a version's files are not what its manifest says, or do not load.
    """
    models: dict[tuple[str, int], LoadedModel] = {}
    for folder in find(repository):
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
        if variants:
            models[manifest.name, manifest.version] = LoadedModel(
                manifest, tuple(variants), tokenizer, providers.names[0]
            )
        _log.info(
            "model loaded",
            extra={
                "model": manifest.name,
                "version": manifest.version,
                "variants": [variant.name for variant in variants],
                "seconds": round(time.monotonic() - started, 3),
            },
        )
    return ModelStore(models)


def _tokenizer(path: Path) -> TextTokenizer:
    try:
        return TextTokenizer(path)
    except Exception as error:  # tokenizers raises plain ones
        raise ManifestError(f"{path}: does not load: {error}") from None
