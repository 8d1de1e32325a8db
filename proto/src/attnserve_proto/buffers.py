"""Memory handed on.

grpc for Python gives what it received as `bytes`, and NumPy's arrays over `bytes` are read-only.
Who alone holds such an object may write to its memory all the same.
"""

import ctypes
import sys

_HEAD = bytes.__basicsize__ - 1  # what precedes the contents; the last byte is their end mark
# Of which views are cut: to make a type for each size takes ten times as long as the view.
_Memory = ctypes.c_char * sys.maxsize


def adopt(message: bytes) -> memoryview:
    """A writable view of a message that nobody else holds, which keeps it alive.

    For one that has just been received: what is in it can be handed on without a copy, and its new
    owner may write to it. Never use it on `bytes` that other code could have a reference to.
    """
    return view_at(id(message) + _HEAD, len(message), message)


def view_at(address: int, size: int, owner: object) -> memoryview:
    """A writable view of memory that `owner` owns, which keeps it alive."""
    memory = _Memory.from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")[:size]
