"""Bytes and whole numbers, packed by compressors that others maintain.

Whole numbers near 0 go several to a byte, as digits, and bytes through the Huffman coder of zlib without its search for
repetitions: two percent above the entropy of such numbers from one bit on, ten percent at 0.4. Zstandard finds false
repetitions there and needs a third more; an arithmetic coder (constriction) reaches it and decodes ten times slower.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import zstandard
from numpy.typing import NDArray

from jointkv.errors import BadInput

RAW_DEFLATE = -15
LEVEL = 1
DIGITS = ((1, 5), (2, 3), (3, 2), (7, 2), (127, 1))
"""Largest magnitude, and how many such numbers share a byte."""

WIDE = len(DIGITS)
"""Marks 16-bit numbers, of which low bytes come before high bytes."""

NOTHING = WIDE + 1
"""Marks zeros only."""

_HEAD = struct.Struct("<BI")


def pack_integers(numbers: NDArray[np.int16]) -> bytes:
    """`numbers [n]` as bytes that `unpack_integers` knows the end of."""
    most = max(int(numbers.max()), -int(numbers.min())) if len(numbers) else 0
    if most == 0:
        return _HEAD.pack(NOTHING, 0)
    kind = next((kind for kind, (limit, _) in enumerate(DIGITS) if most <= limit), WIDE)
    if kind == WIDE:
        data = numbers.astype("<i2").view(np.uint8).reshape(-1, 2).T.tobytes()
    else:
        limit, count = DIGITS[kind]
        digits = np.zeros(-(-len(numbers) // count) * count, np.uint8)
        digits[: len(numbers)] = (numbers + limit).astype(np.uint8)
        columns = digits.reshape(-1, count)
        packed = columns[:, 0].copy()
        for column in range(1, count):
            packed *= np.uint8(2 * limit + 1)
            packed += columns[:, column]
        data = packed.tobytes()
    coder = zlib.compressobj(LEVEL, zlib.DEFLATED, RAW_DEFLATE, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(data) + coder.flush()
    return _HEAD.pack(kind, len(coded)) + coded


def unpack_integers(data: memoryview, count: int) -> tuple[NDArray[np.int16], memoryview]:
    """`count` numbers at the beginning of `data`, int16 `[count]`, and what comes behind them.

    Raises:
        BadInput: they are not there.
    """
    if len(data) < _HEAD.size:
        raise BadInput("a page ends too early")
    kind, length = _HEAD.unpack_from(data)
    coded, rest = data[_HEAD.size : _HEAD.size + length], data[_HEAD.size + length :]
    if kind == NOTHING and not length:
        return np.zeros(count, np.int16), rest
    if kind > WIDE or len(coded) != length:
        raise BadInput("a page ends too early, or holds numbers of an unknown kind")
    limit, together = DIGITS[kind] if kind != WIDE else (0, 1)
    expected = 2 * count if kind == WIDE else -(-count // together)
    packed = np.frombuffer(_inflate(coded, expected), np.uint8)
    if kind == WIDE:
        return packed.reshape(2, -1).T.copy().view("<i2")[:, 0].astype(np.int16), rest
    digits = np.empty((len(packed), together), np.uint8)
    left = packed
    for column in range(together - 1, 0, -1):
        left, digits[:, column] = np.divmod(left, np.uint8(2 * limit + 1))
    digits[:, 0] = left
    return digits.reshape(-1)[:count].astype(np.int16) - np.int16(limit), rest


def _inflate(coded: memoryview, expected: int) -> bytes:
    decoder = zlib.decompressobj(RAW_DEFLATE)
    try:
        found = decoder.decompress(coded, expected + 1)
    except zlib.error as error:
        raise BadInput(f"a page is damaged: {error}") from None
    if len(found) != expected or not decoder.eof:
        raise BadInput("a page holds more or fewer numbers than it should")
    return found


def pack_floats(data: NDArray[np.uint8], itemsize: int) -> bytes:
    """The bytes `data [n * itemsize]` of floating-point numbers: sign behind mantissa, like bytes together, Zstandard.

    Exponents of K and V are few and repeat; signs and mantissas are noise.
    """
    kind = f"<u{itemsize}"
    bits = data.view(kind)
    turned = (bits << np.asarray(1, kind)) | (bits >> np.asarray(8 * itemsize - 1, kind))
    planes = turned.astype(kind, copy=False).view(np.uint8).reshape(-1, itemsize).T
    return zstandard.ZstdCompressor(level=LEVEL).compress(planes.tobytes())


def unpack_floats(packed: memoryview | bytes, nbytes: int, itemsize: int) -> NDArray[np.uint8]:
    """What `pack_floats` was given, `nbytes` of it. Raises BadInput for anything else."""
    try:
        size = zstandard.frame_content_size(packed)
        if size != nbytes:
            raise BadInput(f"a page of {nbytes} bytes was expected, {size} came")
        planes = zstandard.ZstdDecompressor().decompress(packed, max_output_size=nbytes)
    except zstandard.ZstdError as error:
        raise BadInput(f"a page is damaged: {error}") from None
    if len(planes) != nbytes:
        raise BadInput(f"a page of {nbytes} bytes was expected, {len(planes)} came")
    kind = f"<u{itemsize}"
    turned = np.frombuffer(planes, np.uint8).reshape(itemsize, -1).T.copy().view(kind)[:, 0]
    bits = (turned >> np.asarray(1, kind)) | (turned << np.asarray(8 * itemsize - 1, kind))
    return bits.astype(kind, copy=False).view(np.uint8)
