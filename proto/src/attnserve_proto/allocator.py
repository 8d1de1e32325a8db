"""Keeps freed memory in the process instead of giving it back to the system after each request.

Tensors come and go by the megabyte. By default glibc returns such memory at once, and every
request then pays for fresh pages again: a third of a small request's time. See mallopt(3).
"""

import ctypes
import ctypes.util

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_MIB = 1 << 20


def keep_freed_memory() -> None:
    """Tell glibc to keep up to 256 MiB of freed memory; does nothing on other C libraries."""
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is None:
        return
    for option, value in (
        (_MMAP_THRESHOLD, 32 * _MIB),  # the most that glibc takes
        (_TRIM_THRESHOLD, 256 * _MIB),
        (_TOP_PAD, 16 * _MIB),
        (_ARENA_MAX, 2),
    ):
        mallopt(option, value)
