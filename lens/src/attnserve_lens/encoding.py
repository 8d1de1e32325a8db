"""How weights travel in a page: few bytes, with a known error.

A weight w of a row whose heaviest weight is m is the code c = round(C * sqrt(w / m)), read back
as m * (c / C)^2. C is 255 (one byte) or 65535 (two), m a float32 of each row. The error is
m * (d^2 + 2 * d * sqrt(w / m)) with d = 1 / (2C) at most, so below m / C * 1.001: with one byte
0.4 % of the row's heaviest weight, and less the lighter the weight. A row that is spread thin over
512 keys keeps its shape, where rounding w itself to 1/255 would leave nothing of it.

The codes of a layer are deflated (RFC 1951) and written in base64.
"""

import base64
import zlib

import numpy as np
from numpy.typing import NDArray

from attnserve_lens.attention import Array

# Up to so many weights a map is packed with two bytes each; above, with one.
TWO_BYTES_UP_TO = 1 << 21
THUMBNAIL = 32


def code_bits(count: int) -> int:
    """The bits of a code, 8 or 16, by how many weights there are."""
    return 16 if count <= TWO_BYTES_UP_TO else 8


def largest_code(bits: int) -> int:
    """C above."""
    return int((1 << bits) - 1)


def pack_layer(weights: Array, bits: int) -> str:
    """Pack the weights [H, Sq, Sk] of a layer.

    Returns:
        base64 of the deflated `layer_bytes`.
    """
    return pack_bytes(layer_bytes(weights, bits))


def layer_bytes(weights: Array, bits: int) -> bytes:
    """The weights [H, Sq, Sk] of a layer as codes.

    Returns:
        The heaviest weight of each row, [H, Sq] float32, then the codes, [H, Sq, Sk] uint8 or
        uint16; all little-endian.
    """
    exact = weights.astype(np.float32, copy=False)
    heaviest = exact.max(axis=-1)
    codes = np.sqrt(exact / np.where(heaviest > 0, heaviest, 1)[..., None])
    codes *= largest_code(bits)
    np.rint(codes, out=codes)
    parts = heaviest.astype("<f4").tobytes(), codes.astype(f"<u{bits // 8}").tobytes()
    return b"".join(parts)


def unpack_layer(packed: str, shape: tuple[int, int, int], bits: int) -> NDArray[np.float32]:
    """What the page reads back: [H, Sq, Sk]."""
    content = zlib.decompress(base64.b64decode(packed), -zlib.MAX_WBITS)
    rows = shape[0] * shape[1]
    heaviest = np.frombuffer(content, "<f4", rows).reshape(shape[:2])
    codes = np.frombuffer(content, f"<u{bits // 8}", offset=4 * rows).reshape(shape)
    share = codes.astype(np.float32) / np.float32(largest_code(bits))
    unpacked: NDArray[np.float32] = heaviest[..., None] * share * share
    return unpacked


def pack_floats(array: Array) -> str:
    """float32, little-endian, deflated, base64."""
    return pack_bytes(array.astype("<f4").tobytes())


def pack_thumbnails(weights: Array) -> str:
    """The deflated `thumbnail_bytes`, in base64."""
    return pack_bytes(thumbnail_bytes(weights))


def thumbnail_bytes(weights: Array) -> bytes:
    """Pictures of all heads, [L, H, h, w] with h and w at most THUMBNAIL: one byte a pixel.

    A pixel is the heaviest weight of its cell, as 255 * sqrt(weight / heaviest of the picture).
    """
    small = _pooled(_pooled(weights, 2), 3).astype(np.float32)
    heaviest = small.max(axis=(2, 3), keepdims=True)
    codes = np.rint(255 * np.sqrt(small / np.where(heaviest > 0, heaviest, 1)))
    return bytes(codes.astype(np.uint8).tobytes())


def thumbnail_size(length: int) -> int:
    """Pixels of a thumbnail along an axis of that length."""
    return min(length, THUMBNAIL)


def pack_bytes(content: bytes) -> str:
    """Deflated, base64."""
    return base64.b64encode(deflate(content, 6)).decode("ascii")


def deflate(content: bytes, level: int) -> bytes:
    """Deflated without a header (RFC 1951)."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


def _pooled(weights: Array, axis: int) -> Array:
    length = weights.shape[axis]
    starts = np.arange(thumbnail_size(length)) * length // thumbnail_size(length)
    return np.asarray(np.maximum.reduceat(weights, starts, axis=axis))
