"""Files of a model that somebody writes to while it is served, or while it is loaded."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import one_graph
import pytest
import serving
from attnserve_client import AttentionClient
from attnserve_proto.manifest import ManifestError, parse, read_text
from attnserve_server import repository as files

# The row of a table that `key_lengths` names is added to the values. Rows lie 512 KiB apart.
LINES = """
    stride = Constant <value_int = 16384> ()
    row = Mul (key_lengths, stride)
    rows = Gather (table, row)
    axes = Constant <value_ints = [1, 2]> ()
    across = Unsqueeze (rows, axes)
    output = Add (value, across)
"""
ROWS = 9 * 16384


def cut(path: Path) -> None:
    os.truncate(path, 0)


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\x40" * path.stat().st_size)


def unlinked(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [cut, rewritten, unlinked])
def test_weights_that_change_while_they_are_served_change_nothing(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    table = np.random.default_rng(5).standard_normal((ROWS, serving.DIM), np.float32)
    folder = one_graph.write(tmp_path, LINES, table)
    values = np.ones((1, serving.HEADS, 8, serving.DIM), np.float32)
    with serving.process(tmp_path) as server, AttentionClient(server.address) as client:
        change(folder / one_graph.DATA)
        for length in range(1, 9):  # pages that nobody has looked at before
            result = client.attend(
                values, values, values, model="causal", key_lengths=[length], timeout=20
            )
            np.testing.assert_array_equal(result.output, values + table[length * 16384])
        assert server.popen.poll() is None


@pytest.mark.parametrize("change", [cut, rewritten, unlinked])
def test_files_that_change_while_they_are_loaded_are_refused(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    table = np.ones((1024, serving.DIM), np.float32)
    folder = one_graph.write(tmp_path, LINES, table)
    compared = files.check_files(folder, parse(folder, read_text(folder)))
    files.check_unchanged(folder, compared)
    change(folder / one_graph.DATA)
    with pytest.raises(ManifestError, match=r"model\.onnx\.data: changed while it was loaded"):
        files.check_unchanged(folder, compared)
