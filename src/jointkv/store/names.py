"""Under which address a page is stored: a keyed hash of the model, the tenant and every token up to its last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jointkv.errors import BadInput

ADDRESS_BYTES = 32
TEXT_BYTES = 16
KEY_BYTES = 32
FIRST = bytes(ADDRESS_BYTES)
"""Before a prompt's first block there is none."""


@dataclass(frozen=True)
class Named:
    """One block of a prompt.

    Attributes:
        address: of the block behind all that stands before it, 32 bytes.
        text: of its own tokens, whatever stands before, 16 bytes; of a prompt's first block see `text_of`.
    """

    address: bytes
    text: bytes


class Names:
    """Addresses of one model's pages for one tenant. Without the secret nobody can tell what they stand for.

    Args:
        secret: of the store, 32 bytes.
        model: a fingerprint of the weights and of the layout of pages; other models have other addresses.
        isolation: the tenant's key: text, whole numbers, None, or tuples of them.

    Raises:
        BadInput: an isolation key of another kind.
    """

    def __init__(self, secret: bytes, model: str, isolation: Hashable = None) -> None:
        said = json.dumps([model, plain(isolation)]).encode()
        self._key = hashlib.blake2b(said, key=secret, digest_size=KEY_BYTES, person=b"jointkv.tenant").digest()

    def of(self, tokens: Sequence[int], block_size: int, before: bytes = FIRST) -> list[Named]:
        """The whole blocks of a prompt, from its first token on, or from behind the block with the address `before`.

        Raises BadInput for tokens that are not whole numbers in one row: rounded, they would be other text.
        """
        given = np.asarray(tokens)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise BadInput(f"tokens: whole numbers in one row are needed, not {given.dtype} of {list(given.shape)}")
        ids = given.astype("<i8")
        named = []
        for start in range(0, len(ids) - block_size + 1, block_size):
            block = ids[start : start + block_size]
            text = self._hash(text_of(block, before == FIRST).tobytes(), b"jointkv.text", TEXT_BYTES)
            before = self._hash(before + block.tobytes(), b"jointkv.block", ADDRESS_BYTES)
            named.append(Named(before, text))
        return named

    @property
    def transform(self) -> str:
        """Name of the file with the model's transform."""
        return self._hash(b"", b"jointkv.trans", TEXT_BYTES).hex()

    def _hash(self, data: bytes, person: bytes, size: int) -> bytes:
        return hashlib.blake2b(data, key=self._key, digest_size=size, person=person).digest()


def text_of(block: NDArray[np.int64], beginning: bool) -> NDArray[np.int64]:
    """The tokens by which a page is found that may stand for a block, or be what it is a difference to.

    Of the first block of a prompt its first token: headers that begin alike are often alike but for a number or a date.
    """
    return block[:1] if beginning else block


def plain(key: Hashable) -> Any:
    """An isolation key as JSON has it. Raises BadInput where JSON has none."""
    if isinstance(key, tuple):
        return [plain(part) for part in key]
    if key is None or isinstance(key, (str, int)):
        return key
    raise BadInput(f"an isolation key of {type(key).__name__}: use text, whole numbers or tuples of them, as str(key)")
