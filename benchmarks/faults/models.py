"""Versions that are loaded, replaced and unloaded under mixed load: what of it callers notice.

    python benchmarks/faults/models.py --json reports/models.json

Three models, called all the time. `steady` stays. `replaced` always has a version, but which ones
there are changes, and what is in them; versions that are half written or damaged are put beside
them. It must never fail a call, nor answer by another version than it says. `gone` is unloaded and
loaded: its calls are answered, or refused as UNAVAILABLE.
"""

import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import mixed
from attnserve_proto.commands import Parser, values
from attnserve_proto.inference import open_inference_pb2 as oip
from attnserve_proto.inference import open_inference_pb2_grpc as oip_grpc

MASKS = {"1": "causal", "2": "bidirectional"}
STEADY = mixed.Model("steady", {"1": "causal"})
REPLACED = mixed.Model("replaced", MASKS)
GONE = mixed.Model("gone", {"1": "causal"}, ("UNAVAILABLE",))


class Changes:
    """Changes a repository, and tells the server.

    Args:
        address: of the server.
        repository: where it reads.
        sources: a folder with `replaced/1` and `replaced/2` to copy from.
    """

    def __init__(self, address: str, repository: Path, sources: Path) -> None:
        self._repository, self._sources = repository, sources
        self._channel = grpc.insecure_channel(address)
        self._stub = oip_grpc.GRPCInferenceServiceStub(self._channel)
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []

    def round(self) -> None:
        """Every change once; afterwards everything is as before."""
        self._add("2")
        self._load("replaced", "version 2 comes")
        self._remove("1")
        self._load("replaced", "version 1 goes")
        self._add("1")
        self._load("replaced", "version 1 comes back")
        self._swap("1")
        self._load("replaced", "version 1 is replaced by another file")
        for breaking in (self._half_written, self._damaged):
            breaking()
            self._load("replaced", f"version 3 is {breaking.__name__.strip('_')}", allowed=False)
            shutil.rmtree(self._repository / "replaced" / "3")
        self._remove("2")
        self._load("replaced", "version 2 goes")
        unload = oip.RepositoryModelUnloadRequest(model_name="gone")
        self._stub.RepositoryModelUnload(unload, timeout=60)
        self.done["gone is unloaded"] += 1
        time.sleep(0.05)
        self._load("gone", "gone is loaded")

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def _load(self, name: str, what: str, *, allowed: bool = True) -> None:
        code = grpc.StatusCode.OK
        try:
            self._stub.RepositoryModelLoad(
                oip.RepositoryModelLoadRequest(model_name=name), timeout=60
            )
        except grpc.RpcError as error:
            code = error.code()
        expected = grpc.StatusCode.OK if allowed else grpc.StatusCode.FAILED_PRECONDITION
        self.done[what] += 1
        if code is not expected:
            self.faults.append(f"{what}: {code.name}; allowed: {expected.name}")

    def _add(self, version: str) -> None:
        """As `attnserve-export` does: beside its place, then renamed."""
        place = self._repository / "replaced" / version
        beside = place.with_name(f".{version}.new")
        shutil.copytree(self._sources / "replaced" / version, beside)
        beside.rename(place)

    def _remove(self, version: str) -> None:
        shutil.rmtree(self._repository / "replaced" / version)

    def _swap(self, version: str) -> None:
        place = self._repository / "replaced" / version
        old = place.with_name(f".{version}.old")
        place.rename(old)
        self._add(version)
        shutil.rmtree(old)

    def _half_written(self) -> None:
        whole, place = self._sources / "replaced" / "1", self._repository / "replaced" / "3"
        place.mkdir()
        manifest = (whole / "model.json").read_text()
        (place / "model.json").write_text(manifest.replace('"version": 1', '"version": 3'))
        graph = next(whole.glob("*.onnx"))
        content = graph.read_bytes()
        (place / graph.name).write_bytes(content[: len(content) // 2])

    def _damaged(self) -> None:
        self._half_written()
        (self._repository / "replaced" / "3" / "model.json").write_text("{")


def main() -> int:
    """Measure, print, and write the figures; 1 if anything was wrong."""
    parsed = _parser().parse_args()
    tally = mixed.Tally()
    with tempfile.TemporaryDirectory() as folder:
        repository, sources = Path(folder) / "models", Path(folder) / "sources"
        for version, mask in MASKS.items():
            mixed.export(sources, "replaced", mask=mask, version=int(version))
        for name in ("steady", "gone", "replaced"):
            mixed.copy_as(sources / "replaced" / "1", repository, name, 1)
        plan = [
            (STEADY, mixed.STEADY),
            (REPLACED, (mixed.Caller.attend, mixed.Caller.stream)),
            (GONE, (mixed.Caller.attend, mixed.Caller.stream)),
        ]
        with common.attnserve(repository, "--max-queue-ms", "60000", "--max-queue", "4096") as at:
            changes = Changes(at, repository, sources)
            with mixed.load(at, tally, plan, callers=parsed.callers):
                end = time.monotonic() + parsed.seconds
                while time.monotonic() < end:
                    changes.round()
            changes.close()
    tally.wrong += changes.faults
    figures = mixed.outcome(tally)
    internal = sum(n for said, n in tally.refused.items() if said.endswith("INTERNAL"))
    row = {
        "seconds": parsed.seconds,
        "changes": sum(changes.done.values()),
        "answered": figures["answered"],
        "wrong": figures["wrong"],
        "internal": internal,
    }
    print(common.table([row]))
    print("\n".join(tally.wrong[:20]))
    common.write_json(parsed.json, {**row, "changed": dict(changes.done), "calls": figures})
    return 1 if tally.wrong else 0


def _parser() -> Parser:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=values.number(1, 1e5), default=600)
    parser.add_argument("--callers", type=values.integer(1, 256), default=9)
    return parser


if __name__ == "__main__":
    sys.exit(main())
