"""Pages of one model and one tenant in a store: what a prompt has there, put and loaded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jointkv.codec.base import QUANTISED_FORMAT, Aids
from jointkv.codec.choose import Bound, Chooser
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.registry import NEEDS_REFERENCE, decode
from jointkv.codec.transform import Transform
from jointkv.errors import BadInput, LayoutError, ModelMismatch
from jointkv.store.folder import TRANSFORMS, Store
from jointkv.store.names import Named, Names
from jointkv.store.records import NO_BASE, NO_MARK, Record


@dataclass(frozen=True)
class Put:
    """What became of the blocks of a prompt.

    Attributes:
        there: blocks that were stored before.
        codecs: of those that were added, one each.
        nbytes: of those on the disk.
    """

    there: int
    codecs: tuple[str, ...]
    nbytes: int


class PageStore:
    """The pages of one model for one tenant.

    Args:
        store: where they are.
        model: a fingerprint of the weights, such as `jointkv.hf.identity.model_fingerprint`.
        layout: of pages. Those of another model, layout or tenant are not found.
        isolation: the tenant's key.
        bound: what stored pages keep; `Bound(0, 0)` asks for equal bytes. Pages of another bound, or that an earlier
            jointkv quantised into other bytes, are not found.
        transform: of the model; the store keeps it for others. Without one, pages are stored without loss.

    Raises:
        BadInput: something else in the place of a store or a layout, or a key that cannot be written.
        ModelMismatch: a transform of another layout.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        layout: Layout,
        *,
        isolation: Hashable = None,
        bound: Bound = Bound(),
        transform: Transform | None = None,
    ) -> None:
        if not isinstance(store, Store) or not isinstance(layout, Layout):
            given = f"{type(store).__name__} and {type(layout).__name__}"
            raise BadInput(f"pages need a store and a layout, not {given}: PageStore(Store(folder), model, layout)")
        self._store, self.layout = store, layout
        fingerprint = f"{model}/{layout.fingerprint}/{bound.block:g}/{bound.token:g}"
        if bound.block > 0:
            fingerprint += f"/{QUANTISED_FORMAT}"
        self._names = Names(store.secret, fingerprint, isolation)
        shared = Names(store.secret, f"{model}/{layout.fingerprint}")
        file = store.folder / TRANSFORMS / f"{shared.transform}.safetensors"
        self.transform = _shared_transform(store, file, transform)
        if self.transform is not None:
            self.transform.check(layout)
        self._chooser = Chooser(bound, self.transform)

    def prefix(self, tokens: Sequence[int]) -> int:
        """How many whole blocks of a prompt are stored, from its first on."""
        there = self._store.has(self.addresses(tokens))
        return there.index(False) if False in there else len(there)

    def put(self, tokens: Sequence[int], pages: Pages) -> Put:
        """Store the whole blocks of a prompt that are not there; safe after `Store.flush`.

        Args:
            tokens: of the prompt, from its first on.
            pages: one for each of its whole blocks.

        Raises:
            LayoutError: another layout, or not as many pages as blocks.
            StoreError: see `Store.put`.
        """
        blocks = self._names.of(tokens, self.layout.block_size)
        if pages.layout != self.layout or len(pages) != len(blocks):
            raise LayoutError(f"{len(blocks)} blocks need as many pages of the store's layout, got {len(pages)}")
        there = self._store.has([block.address for block in blocks])
        new = [number for number, known in enumerate(there) if not known]
        chosen = pages.take(torch.tensor(new, dtype=torch.long))
        bases, references = self._references([blocks[number] for number in new])
        has = torch.tensor([base is not None for base in bases], dtype=torch.bool)
        encoded = self._chooser.encode(chosen, references, has)
        records = []
        for i, (number, message) in enumerate(zip(new, encoded.messages, strict=True)):
            base = bases[i] if message[0] in NEEDS_REFERENCE else None
            on = (NO_BASE, NO_MARK) if base is None else (base.address, base.mark)
            block, position = blocks[number], int(chosen.positions[i])
            records.append(Record(block.address, block.text, position, on[0], message, on[1]))
        self._store.put(records)
        return Put(len(blocks) - len(new), tuple(encoded.codecs), sum(record.nbytes for record in records))

    def addresses(self, tokens: Sequence[int]) -> list[bytes]:
        """Of the whole blocks of a prompt; what `jointkv.store.wire.fetch` asks for."""
        return [block.address for block in self._names.of(tokens, self.layout.block_size)]

    def load(self, tokens: Sequence[int], most: int | None = None) -> Pages:
        """The pages of the longest stored prefix of a prompt, at most `most`; none where anything is not whole."""
        records = self._store.get(self.addresses(tokens)[:most])
        whole = records.index(None) if None in records else len(records)
        while True:
            pages, good = self._decode([record for record in records[:whole] if record is not None])
            if pages is not None:
                return pages
            whole = good

    def _decode(self, records: Sequence[Record]) -> tuple[Pages | None, int]:
        """The pages of `records`; or None, and how many of the first might be decoded."""
        positions = torch.tensor([record.position for record in records], dtype=torch.long)
        wanted = sorted({record.base for record in records} - {NO_BASE})
        bases = dict(zip(wanted, self._store.get(wanted), strict=True))
        for number, record in enumerate(records):
            if record.base != NO_BASE and not record.stands_on(bases[record.base]):
                return None, number
        try:
            references = None
            if wanted:
                held = [bases[address] for address in wanted]
                decoded = self._plain([base for base in held if base is not None])
                index = [wanted.index(record.base) if record.base != NO_BASE else 0 for record in records]
                references = decoded.take(torch.tensor(index))
            aids = Aids(self.transform, references)
            return decode([record.payload for record in records], self.layout, positions, aids), len(records)
        except (BadInput, ModelMismatch):
            return None, len(records) // 2

    def _plain(self, records: Sequence[Record]) -> Pages:
        """Pages that are no differences."""
        positions = torch.tensor([record.position for record in records], dtype=torch.long)
        return decode([record.payload for record in records], self.layout, positions, Aids(self.transform))

    def _references(self, blocks: Sequence[Named]) -> tuple[list[Record | None], Pages | None]:
        """For each block the record of a stored page like it, see `text_of`, if there is one, and those pages."""
        same = self._store.with_texts([block.text for block in blocks])
        bases = [NO_BASE if r is None else r.address if r.base == NO_BASE else r.base for r in same]
        wanted = sorted(set(bases) - {NO_BASE})
        records = {r.address: r for r in self._store.get(wanted) if r is not None and r.base == NO_BASE}
        found = [records.get(base) for base in bases]
        if not records:
            return found, None
        order = list(records)
        try:
            decoded = self._plain(list(records.values()))
        except (BadInput, ModelMismatch):  # written with another transform
            return [None] * len(found), None
        return found, decoded.take(torch.tensor([0 if r is None else order.index(r.address) for r in found]))


def _shared_transform(store: Store, path: Path, given: Transform | None) -> Transform | None:
    """The transform in the store, else the one given, which is left there for others."""
    if path.is_file():
        try:
            return Transform.load(path)
        except BadInput:
            if given is None:
                return None
    if given is not None and store.write:
        path.parent.mkdir(exist_ok=True)
        given.save(path)
    return given
