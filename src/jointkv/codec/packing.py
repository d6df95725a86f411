"""Bytes and whole numbers, packed by a compressor that others maintain.

Whole numbers near 0 go several to a byte, as digits, and bytes through the Huffman coder of Zstandard. Its search for
repetitions is kept from finding any: in such numbers they are false, and cost a third more. What comes out is two
percent above the entropy from one bit per number on, twelve at 0.5. An arithmetic coder (constriction) reaches the
entropy and takes far longer to decode; zlib's Huffman coder comes out alike and takes six times as long.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache

import numpy as np
import zstandard
from numpy.typing import NDArray

from jointkv.errors import BadInput

LEVEL = 1
"""Of bytes that do repeat."""

LITERALS = {"window_log": 17, "chain_log": 6, "hash_log": 6, "search_log": 1, "min_match": 7, "target_length": 0}
"""A table of 64 entries hardly finds seven equal bytes; negative levels of Zstandard would code no literals."""

DIGITS = ((1, 5), (2, 3), (3, 2), (7, 2), (127, 1))
"""Largest magnitude, and how many such numbers share a byte."""

WIDE = len(DIGITS)
"""Marks 16-bit numbers, of which low bytes come before high bytes."""

NOTHING = WIDE + 1
"""Marks zeros only."""

_HEAD = struct.Struct("<BI")


def pack_integers(numbers: NDArray[np.int16], bands: Sequence[int]) -> bytes:
    """`numbers [n, t]` as bytes, so many of the `n` together as each of `bands` says."""
    coder = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(strategy=zstandard.STRATEGY_FAST, **LITERALS)
    )
    parts, start = [], 0
    for band in bands:
        kind, data = _digits(numbers[start : start + band])
        coded = coder.compress(data) if data else b""
        parts += [_HEAD.pack(kind, len(coded)), coded]
        start += band
    return b"".join(parts)


def unpack_integers(data: memoryview, numbers: NDArray[np.int16], bands: Sequence[int]) -> memoryview:
    """Fill `numbers [n, t]` with what `pack_integers` was given; what comes behind it.

    Raises:
        BadInput: it is not there.
    """
    coder, start = zstandard.ZstdDecompressor(), 0
    for band in bands:
        if len(data) < _HEAD.size:
            raise BadInput("a page ends too early")
        kind, length = _HEAD.unpack_from(data)
        coded, data = data[_HEAD.size : _HEAD.size + length], data[_HEAD.size + length :]
        if kind > NOTHING or len(coded) != length or (kind == NOTHING and length):
            raise BadInput("a page ends too early, or holds numbers of an unknown kind")
        part = numbers[start : start + band]
        part[:] = 0 if kind == NOTHING else _numbers(kind, coded, part.size, coder).reshape(part.shape)
        start += band
    return data


def _digits(numbers: NDArray[np.int16]) -> tuple[int, bytes]:
    """The kind of `numbers` and their bytes; those that share one stand as far apart as there are bytes."""
    most = max(int(numbers.max()), -int(numbers.min())) if numbers.size else 0
    if most == 0:
        return NOTHING, b""
    kind = next((kind for kind, (limit, _) in enumerate(DIGITS) if most <= limit), WIDE)
    if kind == WIDE:
        return kind, numbers.astype("<i2", order="C").view(np.uint8).reshape(-1, 2).T.tobytes()
    limit, together = DIGITS[kind]
    if together == 1:
        return kind, numbers.astype(np.int8).tobytes()
    count = -(-numbers.size // together)
    digits = np.full(count * together, limit, np.uint8)
    digits[: numbers.size] += numbers.astype(np.uint8).reshape(-1)  # modulo 256, so below 0 too
    rows = digits.reshape(together, count)
    packed = rows[-1].copy()
    for row in rows[-2::-1]:
        packed *= np.uint8(2 * limit + 1)
        packed += row
    return kind, packed.tobytes()


def _numbers(
    kind: int, coded: memoryview, size: int, coder: zstandard.ZstdDecompressor
) -> NDArray[np.int8] | NDArray[np.int16]:
    """The `size` numbers that `_digits` was given."""
    together = 1 if kind == WIDE else DIGITS[kind][1]
    count = -(-size // together)
    data = _decompressed(coded, 2 * count if kind == WIDE else count, coder)
    if kind == WIDE:
        return np.frombuffer(data, np.uint8).reshape(2, -1).T.copy().view("<i2")[:, 0]
    if together == 1:
        return np.frombuffer(data, np.int8)
    return np.frombuffer(b"".join(data.translate(table) for table in _tables(kind)), np.int8)[:size]


@cache
def _tables(kind: int) -> list[bytes]:
    """For each of the numbers that share a byte what it is, by the byte."""
    limit, together = DIGITS[kind]
    values, radix = np.arange(256), 2 * limit + 1
    return [(values // radix**place % radix - limit).astype(np.int8).tobytes() for place in range(together)]


def _decompressed(coded: memoryview | bytes, expected: int, coder: zstandard.ZstdDecompressor) -> bytes:
    """The `expected` bytes of `coded`, and no memory for more. Raises BadInput for anything else."""
    try:
        size = zstandard.frame_content_size(coded)
        if size != expected:
            raise BadInput(f"a page is damaged: it holds {size} bytes where {expected} were expected")
        data = coder.decompress(coded, max_output_size=expected)
    except zstandard.ZstdError as error:
        raise BadInput(f"a page is damaged: {error}") from None
    if len(data) != expected:
        raise BadInput(f"a page is damaged: it holds {len(data)} bytes where {expected} were expected")
    return data


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
    planes = _decompressed(packed, nbytes, zstandard.ZstdDecompressor())
    kind = f"<u{itemsize}"
    turned = np.frombuffer(planes, np.uint8).reshape(itemsize, -1).T.copy().view(kind)[:, 0]
    bits = (turned >> np.asarray(1, kind)) | (turned << np.asarray(8 * itemsize - 1, kind))
    return bits.astype(kind, copy=False).view(np.uint8)
