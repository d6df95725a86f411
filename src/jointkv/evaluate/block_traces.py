"""Logs that tell of a prompt only the hashes of its blocks: synthetic tokens with the same repetitions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from jointkv.errors import BadInput

BlockId = int | str
MOST_TOKENS = 10_000_000
"""Of a prompt: a number in a log must not fill the memory."""
_STEP, _ODD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def block_tokens(tokens: int, blocks: int, given: int | None = None) -> int:
    """Tokens of a block of which `blocks` hold a prompt of so many tokens, the last one maybe in part.

    Of two and more blocks only one power of two is possible; a log whose blocks are of another size says `given`. A
    single block is as long as the prompt: longer ones with the same hash begin with it.

    Raises `BadInput` where there is none.
    """
    if given is None:
        given = tokens if blocks == 1 else 1 << (-(-tokens // blocks) - 1).bit_length()
    if -(-tokens // given) != blocks:
        raise BadInput(
            f"hash_ids: {blocks} blocks, and input_length {tokens}: no power of two is their size; "
            "say it as 'block_size'"
        )
    return given


def synthetic_tokens(
    ids: Sequence[BlockId], tokens: int, block: int, vocabulary: int, special: Collection[int]
) -> tuple[int, ...]:
    """A prompt of so many tokens: blocks with equal `ids` hold equal tokens, and others do not.

    Args:
        block: tokens of a block.
        vocabulary: ids are below it.
        special: ids that do not occur.
    """
    seeds = np.array([_seed(each) for each in ids], np.uint64)[:, None]
    mixed = _mixed(seeds + np.arange(min(block, tokens), dtype=np.uint64) * _STEP).reshape(-1)[:tokens]
    made = (mixed % np.uint64(vocabulary)).astype(np.int64)
    plain = np.setdiff1d(np.arange(min(vocabulary, 4 * len(special) + 64)), np.fromiter(special, np.int64))
    return tuple(np.where(np.isin(made, list(special)), plain[made % len(plain)], made).tolist())


def _seed(block: BlockId) -> int:
    return int.from_bytes(blake2b(str(block).encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _ODD
    return numbers ^ (numbers >> np.uint64(31))
