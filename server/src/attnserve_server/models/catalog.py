"""What the repository holds, and loading and unloading it while the server runs."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from attnserve_proto.manifest import ManifestError

from attnserve_server.errors import (
    LateError,
    NotFoundError,
    PreconditionError,
    UnimplementedError,
)
from attnserve_server.models.loading import SlowLoadError
from attnserve_server.models.store import (
    CannotRunError,
    LoadedModel,
    Loader,
    ModelStore,
    loaded,
)
from attnserve_server.repository import find

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One version of one model: READY, LOADING or UNAVAILABLE, and the reason for the last."""

    name: str
    version: int
    state: str
    reason: str


class Catalog:
    """The repository beside the store of what is loaded. Safe to call from several threads.

    Args:
        repository: the folder of models.
        store: what is loaded.
        load: loads one version's folder; None if nothing of it can run here.
        failed: by name and version: why what is not loaded yet did not load.
        changeable: whether models may be loaded and unloaded.
    """

    def __init__(
        self,
        repository: Path,
        store: ModelStore,
        load: Loader,
        failed: Mapping[tuple[str, int], str],
        *,
        changeable: bool,
    ) -> None:
        self._repository = repository
        self._store = store
        self._load = load
        self._changeable = changeable
        self._failed = dict(failed)
        self._unloaded: set[str] = set()
        self._loading: set[str] = set()
        # Models that are loaded or unloaded right now: one call a model at a time.
        self._changing: set[str] = set()
        self._changed = threading.Condition()  # guards both, and what is written of the others

    def entries(self) -> list[CatalogEntry]:
        """Every version in the repository or loaded, by name and version."""
        served = self._served()
        there = {(folder.parent.name, int(folder.name)) for folder in self._all_folders()}
        return [self._entry(name, version, served) for name, version in sorted(served | there)]

    def unavailable(self) -> list[CatalogEntry]:
        """Every version that did not load, by name and version. Does not look at the repository."""
        served = self._served()
        failed = sorted(self._failed.items())
        return [CatalogEntry(*at, UNAVAILABLE, why) for at, why in failed if at not in served]

    def ready(self, name: str) -> bool:
        """Whether the highest version of a model is served: lower ones are not what is meant by its
        name, though they answer to it."""
        versions = self._store.versions(name)
        failed = [version for other, version in self._failed if other == name]
        return bool(versions) and versions[-1] >= max(failed, default=0)

    def load(self, name: str) -> None:
        """Load all versions of a model as they are in the repository now.

        Until they are all there, and if one of them does not load, what was loaded before serves
        on.

        Raises:
            NotFoundError: the repository has no such model.
            LateError: a version has not loaded in time.
            PreconditionError: a version does not load, or nothing of the model can run here.
            UnimplementedError: models are fixed.
        """
        self._check_changeable()
        with self._alone(name):
            folders = self._folders(name)
            if not folders:
                raise NotFoundError(f"model_name: given {name[:128]!r}; the repository has none")
            self._loading.add(name)
            models: list[LoadedModel] = []
            failed: dict[tuple[str, int], str] = {}
            damaged: list[ManifestError] = []
            try:
                for folder in folders:
                    try:
                        models.append(loaded(folder, self._repository, self._load))
                    except ManifestError as error:
                        failed[name, int(folder.name)] = str(error)
                        damaged += [] if isinstance(error, CannotRunError) else [error]
            finally:
                self._loading.discard(name)
            with self._changed:
                others = {at: why for at, why in self._failed.items() if at[0] != name}
                self._failed = others | failed
            if damaged or not models:
                late = next((each for each in damaged if isinstance(each, SlowLoadError)), None)
                if late is not None:
                    raise LateError(f"model_name: {late}")
                reason = [*map(str, damaged), *failed.values()][0]
                raise PreconditionError(f"model_name: {reason}")
            self._store.put(name, models)
            self._unloaded.discard(name)

    def unload(self, name: str) -> None:
        """Unload all versions of a model; requests that run or wait end as if it were there.

        Raises:
            NotFoundError: it is neither loaded nor in the repository.
            UnimplementedError: models are fixed.
        """
        self._check_changeable()
        with self._alone(name):
            if not self._store.versions(name) and not self._folders(name):
                raise NotFoundError(f"model_name: given {name[:128]!r}; there is no such model")
            self._store.put(name, ())
            self._unloaded.add(name)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """While nobody else loads or unloads the model."""
        with self._changed:
            self._changed.wait_for(lambda: name not in self._changing)
            self._changing.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._changing.discard(name)
                self._changed.notify_all()

    def _check_changeable(self) -> None:
        if not self._changeable:
            raise UnimplementedError(
                "model control: this server loads and unloads nothing while it runs "
                "(--no-model-control)"
            )

    def _folders(self, name: str) -> list[Path]:
        return [folder for folder in self._all_folders() if folder.parent.name == name]

    def _all_folders(self) -> list[Path]:
        try:
            return list(find(self._repository))
        except ManifestError:  # the repository is gone; what is loaded serves on
            return []

    def _served(self) -> set[tuple[str, int]]:
        return {(model.manifest.name, model.manifest.version) for model in self._store}

    def _entry(self, name: str, version: int, served: set[tuple[str, int]]) -> CatalogEntry:
        if (name, version) in served:
            return CatalogEntry(name, version, READY, "")
        if name in self._loading:
            return CatalogEntry(name, version, LOADING, "")
        otherwise = "unloaded" if name in self._unloaded else "not loaded"
        reason = self._failed.get((name, version), otherwise)
        return CatalogEntry(name, version, UNAVAILABLE, reason)
