"""Every architecture of the installed transformers, tiny and random: exported, or why not.

Each one has a process of its own, with bounds on its time and memory. What is known already is
kept in the file of results, so that a run that was broken off goes on where it was; with each,
which state of the exporter found it. `--again` examines anew what another state found.

    python benchmarks/architecture_sweep.py --table docs/checkpoints.md
"""

import argparse
import hashlib
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "testing"))

import architectures
import exporter
import torch
from attnserve_export.checkpoints.families import TAKEN, input_of
from attnserve_proto.commands import Parser, values

ROOT = Path(__file__).parents[1]
EXPORTED, REFUSED, WRONG = "exported", "refused", "wrong"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
_MEMORY = 12 << 30
# What makes cores and layers alone.
_OF_OTHER_KINDS = ("models.py", "attention/layer.py")


def examine(model_type: str, native: bool) -> dict[str, Any]:
    """Export one architecture's random checkpoint; if it is refused for reading several things at
    once, each part of it that reads one.

    Args:
        model_type: of its config.json.
        native: whether the variant `native` too.

    Returns:
        What came of it: `outcome`, and `reason` or the largest error.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            architectures.write_checkpoint(model_type, folder / "checkpoint")
        except Exception as error:
            return _refused(f"no tiny configuration could be made: {_short(error)}")
        whole = _export(folder, native, "")
        offered = re.search(r"allowed: a part of it .*--part ([\w ]+)", whole.get("reason", ""))
        if offered is None:
            return whole
        parts = {part: _export(folder, native, part) for part in offered[1].split(" or ")}
    exported = {part: found for part, found in parts.items() if found["outcome"] == EXPORTED}
    if not exported:
        return next(iter(parts.values()))
    return {
        "outcome": EXPORTED,
        "error": max(found["error"] for found in exported.values()),
        "variants": next(iter(exported.values()))["variants"],
        "attentions": [
            f"{part}: {name}" for part, found in exported.items() for name in found["attentions"]
        ],
    }


def _export(folder: Path, native: bool, part: str) -> dict[str, Any]:
    from attnserve_export import building, errors
    from attnserve_export.cli import _parser

    checkpoint = folder / "checkpoint"
    arguments = ["transformer", "--out", str(folder / "models"), "--name", f"tiny{part}"]
    arguments += ["--part", part] if part else []
    arguments += [] if native else ["--no-native"]
    options = _parser().parse_args([*arguments, "--checkpoint", str(checkpoint)])
    try:
        target = folder / f"models/tiny{part}/1"
        manifest = building.transformer(options, target, lambda _: None)
    except errors.VerificationError as error:
        return _refused(f"its graph differs: {str(error).removeprefix('--checkpoint: ')}")
    except errors.ExportError as error:
        return _refused(str(error).replace(f"{checkpoint}: ", "").removeprefix("--checkpoint: "))
    except Exception as error:
        return {"outcome": WRONG, "reason": _short(error)}
    assert manifest.transformer is not None
    return {
        "outcome": EXPORTED,
        "error": max(variant.verification.largest_error for variant in manifest.variants),
        "variants": [variant.name for variant in manifest.variants],
        "attentions": [attention.name for attention in manifest.transformer.attentions],
    }


def refused_at_once(model_type: str) -> dict[str, Any] | None:
    """What its class alone says against an architecture; None: nothing."""
    try:
        model_class = architectures.model_class_of(model_type)
        if model_class is None:
            return _refused("it is a part of others: AutoModel has no model of its own for it")
        given = input_of(model_class)
    except Exception as error:  # of a library that is not there
        return _refused(f"transformers cannot load its class: {_short(error)}")
    return None if given in TAKEN else _refused(f"it takes {given}, no token ids")


def state_of_exporter() -> str:
    """A digest of what the outcome depends on: the exporter's sources, PyTorch and its kin."""
    digest = hashlib.sha256()
    sources = ROOT / "export/src/attnserve_export"
    for path in sorted(sources.glob("**/*.py")):
        if str(path.relative_to(sources)) not in _OF_OTHER_KINDS:
            digest.update(path.read_bytes())
    for library in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu"):
        digest.update(f"{library}=={metadata.version(library)}".encode())
    return digest.hexdigest()[:12]


def sweep(
    model_types: Iterable[str],
    results: Path,
    processes: int,
    seconds: int,
    native: bool,
    again: bool,
) -> dict[str, dict[str, Any]]:
    """Examine all that the results do not hold yet.

    Args:
        model_types: to examine.
        results: file of JSON lines; grows.
        processes: at a time.
        seconds: that one may take.
        native: whether the variant `native` too.
        again: also what another state of the exporter found.
    """
    known = read(results)
    state = state_of_exporter()
    missing = [
        each
        for each in model_types
        if each not in known or (again and known[each]["exporter"] != state)
    ]
    if not missing:
        return known
    _warm_up()
    started = time.monotonic()
    with ThreadPoolExecutor(processes) as pool, results.open("a", encoding="utf-8") as file:

        def keep(model_type: str, found: dict[str, Any]) -> None:
            known[model_type] = {**found, "exporter": state}
            line = {"model_type": model_type, **known[model_type]}
            print(json.dumps(line), file=file, flush=True)

        for model_type in list(missing):
            found_at_once = refused_at_once(model_type)
            if found_at_once is not None:
                missing.remove(model_type)
                keep(model_type, found_at_once)
        under_way = {pool.submit(_alone, each, seconds, native): each for each in missing}
        for number, done in enumerate(as_completed(under_way), 1):
            model_type, found = under_way[done], done.result()
            keep(model_type, found)
            said = found.get("reason") or f"error {found['error']:.1e}"
            print(
                f"[{time.monotonic() - started:6.0f} s] {number}/{len(missing)} {model_type}: "
                f"{found['outcome']}: {said}",
                file=sys.stderr,
                flush=True,
            )
    return known


def _warm_up() -> None:
    """Do once, before processes are forked, what each of them would do first."""
    from attnserve_export import building, cli, graphs

    assert building
    assert cli
    torch.set_num_threads(1)
    exporter.read_operators_once()
    inputs = [graphs.Input("hidden_states", torch.ones(2, 3, 8), ("batch", "seq_len", 8))]
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Softmax(-1))
    graphs.export(layer, inputs, ["output"], 23, ends={})


def read(results: Path) -> dict[str, dict[str, Any]]:
    """What is known, by model type; the last line of one counts."""
    if not results.is_file():
        return {}
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return {line.pop("model_type"): line for line in lines}


def table(known: dict[str, dict[str, Any]]) -> str:
    """Markdown: what is exported, and how often each reason stands against it."""
    exported = {name: found for name, found in known.items() if found["outcome"] == EXPORTED}
    reasons: dict[str, list[str]] = {}
    for name, found in sorted(known.items()):
        if name not in exported:
            reasons.setdefault(_kind_of(found["reason"]), []).append(name)
    largest = max((found["error"] for found in exported.values()), default=0.0)
    state = state_of_exporter()
    current = {name for name, found in known.items() if found["exporter"] == state}
    lines = [
        f"{len(exported)} of {len(known)} architectures are exported, the largest error "
        f"{largest:.1e}. The exporter as it is now tried {len(current)} of them, "
        f"{len(exported.keys() & current)} of those that are exported:",
        "",
        "| attentions | `model_type` |",
        "| --- | --- |",
    ]
    by_attention: dict[str, list[str]] = {}
    for name, found in sorted(exported.items()):
        by_attention.setdefault(", ".join(found["attentions"]), []).append(f"`{name}`")
    for attentions, names in sorted(by_attention.items()):
        lines.append(f"| {attentions} | {', '.join(names)} |")
    lines += [
        "",
        "Refused, by the reason that the export names:",
        "",
        "| reason | | `model_type` |",
        "| --- | --- | --- |",
    ]
    for reason, names in sorted(reasons.items(), key=lambda entry: -len(entry[1])):
        listed = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {reason.replace('|', '/')} | {len(names)} | {listed} |")
    untried = [f"`{name}`" for name in architectures.model_types() if name not in known]
    if untried:
        lines += ["", f"Not tried yet, {len(untried)}: {', '.join(untried)}."]
    return "\n".join(lines) + "\n"


def _kind_of(reason: str) -> str:
    """A reason without what differs from model to model."""
    shown = reason.removeprefix("config.json: ")
    return re.sub(r"\d+", "n", re.split(r": |; |, by |, but ", shown)[0])


def _alone(model_type: str, seconds: int, native: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_bounded, args=(model_type, native, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return _refused(f"it takes longer than {seconds} s")
        found: dict[str, Any] = receiver.recv()
        return found
    except EOFError:
        process.join()
        return _refused(f"its process ended by itself: {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _bounded(model_type: str, native: bool, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    try:
        sender.send(examine(model_type, native))
    except MemoryError:
        sender.send(_refused(f"it takes more than {_MEMORY >> 30} GiB"))


def _refused(reason: str) -> dict[str, Any]:
    return {"outcome": REFUSED, "reason": " ".join(reason.split())}


def _short(error: Exception) -> str:
    said = re.sub(r"/\S*/site-packages/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {said[:200]}"


def main() -> int:
    """Run the sweep; 1 if an architecture failed in a way that says nothing."""
    options = _parser().parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    types = architectures.model_types() if options.only is None else options.only
    known = sweep(
        types,
        options.results,
        options.processes,
        options.seconds,
        options.native,
        options.again,
    )
    if options.table is not None:
        text = options.table.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        options.table.write_text(f"{before}{BEGIN}\n{table(known)}{END}{after}", encoding="utf-8")
    wrong = [name for name, found in known.items() if found["outcome"] == WRONG]
    count = sum(found["outcome"] == EXPORTED for found in known.values())
    print(f"{count} exported, {len(known) - count - len(wrong)} refused, wrong: {wrong or 'none'}")
    return 1 if wrong else 0


def _parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    seconds = values.integer(1, 1_000_000)
    add("--results", type=values.path, default=ROOT / "docs/checkpoints/architectures.jsonl")
    add("--again", action="store_true", help="also what another state of the exporter found")
    add("--table", type=values.path, help="document to put the table into")
    add("--processes", type=values.integer(1, 1024), default=2)
    add("--seconds", type=seconds, default=300, help="that one architecture may take")
    add("--native", action="store_true", help="both variants: twice the time")
    add("--only", nargs="*", type=_model_type, metavar="TYPE", help="model types; all without it")
    return parser


def _model_type(given: str) -> str:
    if given not in architectures.model_types():
        values.refuse(given, "a model type of transformers, as config.json says it")
    return given


if __name__ == "__main__":
    sys.exit(main())
