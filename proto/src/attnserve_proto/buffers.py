"""Messages made in place.

grpc for Python sends `bytes` and nothing else, and the ways that Python has to make one copy what
they are made of. The C API has another: `PyBytes_FromStringAndSize` with no string gives an object
whose memory its maker fills before anybody else sees it
(https://docs.python.org/3/c-api/bytes.html). So a kernel can write its output where it is sent
from.
"""

import ctypes

_HEAD = bytes.__basicsize__ - 1  # what precedes the contents; the last byte is their end mark

_new = ctypes.pythonapi.PyBytes_FromStringAndSize
_new.restype = ctypes.py_object
_new.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)


def blank(size: int) -> tuple[bytes, memoryview]:
    """A new `bytes` object and a view to fill it through.

    Args:
        size: at least 2 bytes: shorter ones are shared by all of Python.

    Returns:
        The object, its contents undefined, and a writable view of them, which keeps the object
        alive. Fill all of it before the object goes anywhere.
    """
    if size < 2:
        raise ValueError(f"size: {size}; allowed: 2 or more")
    made: bytes = _new(None, size)
    return made, adopt(made)


def adopt(message: bytes) -> memoryview:
    """A writable view of a message that nobody else holds, which keeps it alive.

    For one that has just been received: what is in it can be handed on without a copy, and its new
    owner may write to it. Never use it on `bytes` that other code could have a reference to.
    """
    contents = (ctypes.c_char * len(message)).from_address(id(message) + _HEAD)
    contents.owner = message  # type: ignore[attr-defined]
    return memoryview(contents).cast("B")
