"""A core model whose one graph a test has written by hand, in ONNX's text format."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from serving import DIM, HEADS, write_causal

DATA = "model.onnx.data"


def write(repository: Path, lines: str, table: np.ndarray | None = None) -> Path:
    """Write version 1 of `causal` with one variant, `fused`.

    Args:
        repository: the folder of models.
        lines: of the graph, from `query`, `key`, `value` and `key_lengths` to `output`.
        table: what the graph knows as `table`; its elements lie in a file of their own.

    Returns:
        The version's folder.
    """
    folder = write_causal(repository) / "causal/1"
    shape = f"float[batch, {HEADS}, length, {DIM}]"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        by_hand ({shape} query, {shape} key, {shape} value, int64[batch] key_lengths)
        => ({shape} output) {{ {lines} }}"""
    )
    for path in folder.glob("model*.onnx*"):
        path.unlink()
    if table is not None:
        model.graph.initializer.append(numpy_helper.from_array(table, "table"))
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=table is not None,
        location=DATA,
        size_threshold=1024,
    )
    manifest = json.loads((folder / "model.json").read_text())
    manifest["variants"] = [row for row in manifest["variants"] if row["name"] == "fused"]
    manifest["picks"] = {}
    manifest["files"] = {path.name: entry_of(path) for path in folder.glob("model.onnx*")}
    (folder / "model.json").write_text(json.dumps(manifest))
    return folder


def entry_of(path: Path) -> dict[str, str | int]:
    """What a manifest says of one of its files."""
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def late_mean(numbers: str) -> str:
    """Lines that compute `mean`, a scalar, for many minutes in one node: ONNX Runtime looks between
    nodes whether it should end.

    It is of the means over 1,000,000 windows of 1,000,000 numbers.

    Args:
        numbers: what makes them, of a `size` of three dimensions.
    """
    return f"""
        size = Constant <value_ints = [1, 1, 2000000]> ()
        many = {numbers}
        means = AveragePool <kernel_shape = [1000000]> (many)
        mean = ReduceMax <keepdims = 0> (means)"""
