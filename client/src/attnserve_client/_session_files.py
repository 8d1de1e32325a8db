"""Saved sessions: what an export gives, in a file.

    attnserve session 1\\n
    a line of JSON: model, num_layers
    for each chunk: its size, 8 bytes little-endian, and the chunk as it came

Whether a chunk is whole and right, it says itself: the server checks it.
"""

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from attnserve_proto.commands import replacing

from attnserve_client import _arguments as arguments

_FIRST_LINE = b"attnserve session 1\n"
_SIZE = struct.Struct("<Q")
_MOST_CHUNK_BYTES = 1 << 31  # as a message of protobuf

PathOrFile = str | os.PathLike[str] | BinaryIO


@contextlib.contextmanager
def writing(to: PathOrFile, model: str, num_layers: int) -> Iterator[Callable[[bytes], None]]:
    """What writes a session's chunks, one after another. A file of a path is there once whole."""
    if not isinstance(to, str | os.PathLike):
        if not hasattr(to, "write"):
            raise arguments.mistyped("to", to, "a path, or a file open for writing bytes")
        yield _writer(to, model, num_layers)
        return
    with replacing(Path(to)) as beside, beside.open("wb") as file:
        yield _writer(file, model, num_layers)


def _writer(file: BinaryIO, model: str, num_layers: int) -> Callable[[bytes], None]:
    facts = json.dumps({"model": model, "num_layers": num_layers})
    file.write(_FIRST_LINE + facts.encode() + b"\n")

    def write(chunk: bytes) -> None:
        file.write(_SIZE.pack(len(chunk)))
        file.write(chunk)

    return write


@contextlib.contextmanager
def reading(source: PathOrFile) -> Iterator[tuple[str, int, Iterator[bytes]]]:
    """Model, number of layers, and the chunks, one after another.

    Raises:
        ValueError: it is no saved session, or ends too early.
    """
    if not isinstance(source, str | os.PathLike) and not hasattr(source, "readline"):
        raise arguments.mistyped("source", source, "a path, or a file open for reading bytes")
    with contextlib.ExitStack() as stack:
        file = (
            stack.enter_context(Path(source).open("rb"))
            if isinstance(source, str | os.PathLike)
            else source
        )
        if file.readline(len(_FIRST_LINE)) != _FIRST_LINE:
            raise ValueError("no saved session: its first line is another one")
        facts = json.loads(file.readline(1 << 16))
        yield str(facts["model"]), int(facts["num_layers"]), _chunks(file)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while size_bytes := file.read(_SIZE.size):
        size = _SIZE.unpack(size_bytes)[0] if len(size_bytes) == _SIZE.size else 0
        chunk = file.read(size) if 0 < size < _MOST_CHUNK_BYTES else b""
        if not chunk or len(chunk) < size:
            raise ValueError("no saved session: it ends in the middle of a chunk")
        yield chunk
