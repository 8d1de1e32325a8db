"""What the repository holds, and loading and unloading it while the server runs."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attnserve_proto.manifest import ManifestError

from attnserve_server.errors import NotFoundError, PreconditionError, UnimplementedError
from attnserve_server.models.store import LoadedModel, ModelStore
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
        changeable: whether models may be loaded and unloaded.
    """

    def __init__(
        self,
        repository: Path,
        store: ModelStore,
        load: Callable[[Path], LoadedModel | None],
        *,
        changeable: bool,
    ) -> None:
        self._repository = repository
        self._store = store
        self._load = load
        self._changeable = changeable
        self._reasons: dict[str, str] = {}
        self._loading: str | None = None
        self._lock = threading.Lock()

    def entries(self) -> list[CatalogEntry]:
        """Every version in the repository or loaded, by name and version."""
        loaded = {(model.manifest.name, model.manifest.version) for model in self._store}
        there = {(folder.parent.name, int(folder.name)) for folder in self._all_folders()}
        return [self._entry(name, version, loaded) for name, version in sorted(loaded | there)]

    def load(self, name: str) -> None:
        """Load all versions of a model as they are in the repository now.

        Until they are all there, and if one of them does not load, what was loaded before serves
        on.

        Raises:
            NotFoundError: the repository has no such model.
            PreconditionError: a version does not load, or nothing of the model can run here.
            UnimplementedError: models are fixed.
        """
        self._check_changeable()
        with self._lock:
            folders = self._folders(name)
            if not folders:
                raise NotFoundError(f"model_name: given {name[:128]!r}; the repository has none")
            self._loading = name
            try:
                found = [self._load(folder) for folder in folders]
            except ManifestError as error:
                # The caller need not know where the repository is.
                self._reasons[name] = str(error).replace(f"{self._repository}/", "")
                raise PreconditionError(f"model_name: {self._reasons[name]}") from None
            finally:
                self._loading = None
            models = [model for model in found if model is not None]
            if not models:
                self._reasons[name] = "no variant can run on this server"
                raise PreconditionError(f"model_name: {name}: {self._reasons[name]}")
            self._store.put(name, models)
            self._reasons.pop(name, None)

    def unload(self, name: str) -> None:
        """Unload all versions of a model; requests that run or wait end as if it were there.

        Raises:
            NotFoundError: it is neither loaded nor in the repository.
            UnimplementedError: models are fixed.
        """
        self._check_changeable()
        with self._lock:
            if not self._store.versions(name) and not self._folders(name):
                raise NotFoundError(f"model_name: given {name[:128]!r}; there is no such model")
            self._store.put(name, ())
            self._reasons[name] = "unloaded"

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

    def _entry(self, name: str, version: int, loaded: set[tuple[str, int]]) -> CatalogEntry:
        if (name, version) in loaded:
            return CatalogEntry(name, version, READY, "")
        if name == self._loading:
            return CatalogEntry(name, version, LOADING, "")
        return CatalogEntry(name, version, UNAVAILABLE, self._reasons.get(name, "not loaded"))
