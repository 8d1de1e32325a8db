"""From modules to a version in the repository: export, verify, write."""

import contextlib
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from attnserve_proto.manifest import Attention, Layer, Manifest, Transformer, VariantEntry

import attnserve_export
from attnserve_export import graphs, repository, storage
from attnserve_export.errors import VerificationError
from attnserve_export.graphs import Graph
from attnserve_export.runtime import CPU, CUDA
from attnserve_export.tuning import default_picks
from attnserve_export.verification import Case, verify

Progress = Callable[[str], None]
CaseMaker = Callable[[str, np.random.Generator], Iterable[Case]]

# Each dimension's size while tracing: all different, so that none is mistaken for another.
TRACED = {"batch": 2, "query_len": 5, "key_len": 7, "seq_len": 6, "target_len": 9}


@dataclass(frozen=True)
class Exported:
    """A variant's graph, and what else the manifest says of it (see `VariantSpec`).

    Attributes:
        graph: what is served.
        memory, providers, native: as there.
        verified_as: the same graph in a dtype that the CPU runs, if it does not run `graph`.
    """

    graph: Graph
    memory: str = "quadratic"
    providers: tuple[str, ...] = (CUDA, CPU)
    native: bool = False
    verified_as: Graph | None = None


@dataclass(frozen=True)
class Description:
    """What the manifest says of a model besides its graphs."""

    name: str
    version: int
    kind: str
    dtype: str
    attention: Attention
    source: Mapping[str, Any]
    layer: Layer | None = None
    transformer: Transformer | None = None
    tokenizer: str | None = None


def write_version(
    description: Description,
    variants: Mapping[str, Exported],
    target: Path,
    *,
    cases: CaseMaker,
    reference: str,
    extra_files: Mapping[str, bytes],
    progress: Progress,
    release: Callable[[], None] | None = None,
) -> Manifest:
    """Verify all graphs and write them with their manifest.

    Args:
        description: for the manifest.
        variants: by name; the first becomes `model.onnx`.
        target: the version's folder.
        cases: the cases of a variant, by its name and a source of random numbers.
        reference: what the graphs are compared with, in words.
        extra_files: further files of the version.
        progress: told what is going on.
        release: for models that should be in memory only once: all cases are made before anything
            is written, and this is called before anything is verified, to give back the memory of
            parameters that lie outside of the graphs.

    Returns:
        The manifest.

    Raises:
        VerificationError: a graph missed its tolerance; nothing is written.
    """
    seed = secrets.randbits(32)
    prepared: dict[str, list[Case]] = {}
    if release is not None:
        progress("computing what the graphs are compared with")
        for name in variants:
            prepared[name] = list(cases(name, np.random.default_rng(seed)))
    with repository.staging(target) as folder:
        graph_of = {name: variant.graph for name, variant in variants.items()}
        beside = {
            f"{name}.verified": variant.verified_as
            for name, variant in variants.items()
            if variant.verified_as is not None and variant.verified_as.parameters
        }
        progress("writing")
        storage.save(folder, graph_of | beside)
        if release is not None:
            release()
        for name, content in extra_files.items():
            (folder / name).write_bytes(content)
        entries = []
        for name, file in storage.file_names(graph_of).items():
            model = onnx.load(folder / file, load_external_data=False)
            if not variants[name].native:  # the checker knows no operators of ours
                onnx.checker.check_model(str(folder / file))

            def report(text: str, name: str = name) -> None:
                progress(f"verifying {name}: {text}")

            try:
                with _to_verify(variants[name], folder / file) as (path, how):
                    verification = verify(
                        path,
                        prepared.get(name) or list(cases(name, np.random.default_rng(seed))),
                        reference=reference + how,
                        seed=seed,
                        progress=report,
                        lean=release is not None,
                    )
            except VerificationError as error:
                raise VerificationError(f"variant {name}: {error}") from None
            entries.append(
                VariantEntry(
                    name=name,
                    file=file,
                    inputs=storage.tensor_entries(list(model.graph.input)),
                    outputs=storage.tensor_entries(list(model.graph.output)),
                    providers=variants[name].providers,
                    memory=variants[name].memory,
                    native=variants[name].native,
                    verification=verification,
                )
            )
        manifest = Manifest(
            name=description.name,
            version=description.version,
            kind=description.kind,
            dtype=description.dtype,
            opset=graphs.opset_of(next(iter(graph_of.values())).model),
            attention=description.attention,
            layer=description.layer,
            transformer=description.transformer,
            tokenizer=description.tokenizer,
            variants=tuple(entries),
            picks=default_picks(entries),
            source=description.source,
            created_by={
                "attnserve_export": attnserve_export.__version__,
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
            },
        )
        repository.commit(folder, target, manifest)
    return manifest


@contextlib.contextmanager
def _to_verify(variant: Exported, path: Path) -> Iterator[tuple[Path, str]]:
    """The file to verify, and what to say of it besides the reference."""
    how = "; the same graph in FP32, which the CPU can run"
    beside = path.with_suffix(".verified.onnx")
    if variant.verified_as is None:
        yield path, ""
    elif beside.exists():  # since it has the same parameters
        yield beside, how
        beside.unlink()
    else:
        with tempfile.TemporaryDirectory() as name:
            storage.save(Path(name), {"model": variant.verified_as})
            yield Path(name) / "model.onnx", how
