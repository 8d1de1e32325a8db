"""Pieces of ONNX's text format (https://onnx.ai/onnx/repo-docs/Syntax.html)."""

from collections.abc import Sequence


def joined(lines: Sequence[str]) -> str:
    """Nodes of a graph."""
    return "\n".join(lines)


def exact(number: float) -> str:
    """A number, with all its digits."""
    return f"{number:.17e}"
