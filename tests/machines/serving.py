"""Requests on a `JointPool` as a server would run them, with an exact prefix cache."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jointkv.core.pool import BlockPool
from jointkv.errors import PoolFull
from jointkv.fusion.token_index import TokenIndex
from jointkv.hf.batch import Batch as Held
from jointkv.hf.cache import JointCache
from jointkv.hf.pool import JointPool
from tests.core.shadow import Content
from tests.machines.contexts import ROOT, Contexts

BLOCK = 2
ROUNDING = 1e-5
"""Errors are decided on in float32 and checked in float64."""

Text = list[int]
Padded = list[int | None]


@dataclass(eq=False)
class Batch:
    """A cache, what was written to it, and the prompts that are still to be read.

    Attributes:
        tenants, texts, contexts: per row; tokens read so far, and the context that each of them makes.
        waiting: per row the tokens to come, None for left padding; all of one length.
        mask: per row the attention mask so far.
        cut: (row, slot) of served blocks that were cropped. Each of their tokens is within its bound; the block as a
            whole was, with the tokens that are gone.
    """

    cache: JointCache
    tenants: list[str]
    waiting: list[Padded]
    texts: list[Text] = field(default_factory=list)
    contexts: list[list[int]] = field(default_factory=list)
    mask: list[list[int]] = field(default_factory=list)
    cut: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        for rows in (self.texts, self.contexts, self.mask):
            rows.extend([] for _ in range(len(self.tenants) - len(rows)))

    def select(self, rows: Sequence[int]) -> None:
        """What belongs to the rows follows them; each becomes a list of its own."""
        for name in ("tenants", "waiting", "texts", "contexts", "mask"):
            setattr(self, name, [copy.copy(getattr(self, name)[row]) for row in rows])
        self.cut = {(new, slot) for new, row in enumerate(rows) for old, slot in self.cut if old == row}

    def crop(self, tokens: int) -> None:
        """Forget the last columns."""
        for row, mask in enumerate(self.mask):
            kept = sum(mask[: len(mask) - tokens])
            del self.texts[row][kept:], self.contexts[row][kept:], mask[len(mask) - tokens :]
            if kept % BLOCK and any(table.served[row, kept // BLOCK] for table in self.cache.tables):
                self.cut.add((row, kept // BLOCK))
        self.cut = {(row, slot) for row, slot in self.cut if slot * BLOCK < len(self.texts[row])}

    def approximate(self, row: int) -> bool:
        """Whether attention of this row reads a block that is not what was written."""
        slots = torch.arange(-(-len(self.contexts[row]) // BLOCK))
        rows = torch.full_like(slots, row)
        return any(bool((table.served[rows, slots] | table.scaled(rows, slots)).any()) for table in self.cache.tables)

    def blocks(self) -> Tensor:
        """The contexts of each block, `ROOT` where a token is missing: long `[rows, slots, BLOCK]`."""
        slots = max(-(-len(row) // BLOCK) for row in self.contexts)
        padded = [row + [ROOT] * (slots * BLOCK - len(row)) for row in self.contexts]
        return torch.tensor(padded, dtype=torch.long).view(len(padded), slots, BLOCK)


class Server:
    """Runs batches. Everything it does goes through the public methods of pool, cache and tables.

    Attributes:
        running: batches that are fed; finished: caches kept for later prefix hits; swapped: copies of preempted ones,
            and what their served blocks read.
        prefixes: exact prefix cache: the page of each block of an exact context, by tenant and layer group.
        exact: the contexts that a page in `prefixes` was entered for.
        tally: what has happened.
    """

    def __init__(self, pool: JointPool, contexts: Contexts, tally: Counter[str]) -> None:
        self.pool, self.contexts, self.tally = pool, contexts, tally
        self.prefixes = TokenIndex()
        self.exact: dict[int, list[int]] = {}
        self.running: list[Batch] = []
        self.finished: list[Batch] = []
        self.swapped: list[tuple[Batch, dict[str, Tensor], dict[tuple[int, int, int], Content]]] = []

    @property
    def blocks(self) -> BlockPool:
        assert self.pool.blocks is not None
        return self.pool.blocks

    @property
    def holders(self) -> list[Batch]:
        return [*self.running, *self.finished]

    def admit(self, tenants: list[str], texts: list[Text], hit: bool) -> Batch:
        """A batch that will read `texts`, left-padded; a single one may begin with blocks of the prefix cache."""
        width = max(map(len, texts))
        waiting: list[Padded] = [[None] * (width - len(text)) + text for text in texts]
        alone = len(tenants) == 1
        batch = Batch(JointCache(self.pool, tenants[0] if alone else list(tenants)), list(tenants), waiting)
        if hit and alone and self.pool.blocks is not None:
            self._hit(batch)
        self.running.append(batch)
        return batch

    def _hit(self, batch: Batch) -> None:
        """Let a new batch of one row share the exact pages of the longest prefix that is known; one token is left."""
        (tenant,), (text,), cache = batch.tenants, batch.waiting, batch.cache
        contexts, pages, context = [], [], ROOT
        for slot in range((len(text) - 1) // BLOCK):
            for token in text[slot * BLOCK : (slot + 1) * BLOCK]:
                context = self.contexts.after(context, token)
                contexts.append(context)
            groups = range(self.pool.groups.count)
            found = [self.prefixes.candidates([((tenant, group), context)], 1) for group in groups]
            if not all(found):
                break
            pages.append([page for (page,) in found])
        if not pages:
            return
        length = len(pages) * BLOCK
        cache.batch = Held(self.pool, [tenant])
        for table, row in zip(cache.tables, torch.tensor(pages).T, strict=True):
            table.adopt(row[None], torch.zeros(1, len(row), dtype=torch.bool), None, None)
        cache.batch.length = length
        cache._set_length(length)
        batch.texts, batch.waiting, batch.mask = [text[:length]], [text[length:]], [[1] * length]
        batch.contexts = [contexts[:length]]
        self.tally["blocks_hit"] += len(pages)

    def feed(self, batch: Batch, columns: list[Padded], layers: int | None = None) -> bool:
        """A forward pass over `columns`, per row the next tokens; False if the pool was full, and nothing changed.

        `layers`: break off after so many, as an error in the model would.
        """
        cache = batch.cache
        contexts = [self._contexts_of(batch, row, tokens) for row, tokens in enumerate(columns)]
        mask = [old + [int(token is not None) for token in new] for old, new in zip(batch.mask, columns, strict=True)]
        ids = torch.tensor([[token or 0 for token in tokens] for tokens in columns])
        keys, values = self.contexts.states(contexts)
        self._forget_written(batch)
        before = [self._snapshot(batch, pages) for pages in (True, False)]
        try:
            cache.begin_step(torch.tensor(mask), ids)
            for layer, key, value in list(zip(cache.layers, keys, values, strict=True))[:layers]:
                layer.update(key, value)
        except PoolFull as full:
            assert 0 < full.missing <= full.requested and full.total == self.pool.max_pages
            assert self._snapshot(batch) == before[0]
            self.tally["pool_full"] += 1
            return False
        if layers is not None:
            cache.end_step()
            assert self._snapshot(batch, pages=False) == before[1]
            return False
        cache.end_step()
        batch.mask = mask
        for row, tokens in enumerate(columns):
            batch.texts[row] += [token for token in tokens if token is not None]
            batch.contexts[row] += [context for context in contexts[row] if context != ROOT]
        self._remember(batch)
        return True

    def _contexts_of(self, batch: Batch, row: int, tokens: Padded) -> list[int]:
        """The context of each token of a row, `ROOT` for padding."""
        context = batch.contexts[row][-1] if batch.contexts[row] else ROOT
        exact, made = not batch.approximate(row), []
        for token in tokens:
            if token is not None:
                context = self.contexts.after(context, token, exact)
            made.append(context if token is not None else ROOT)
        return made

    def _snapshot(self, batch: Batch, pages: bool = True) -> list[object]:
        """What a forward pass that was refused, or broke off, leaves as it was."""
        cache = batch.cache
        held = [table.pages if pages else table.num_blocks() for table in cache.tables] if cache.length else []
        lengths = [cache.length, *(layer.get_seq_length() for layer in cache.layers)]
        return [*lengths, *(part.tolist() for part in held)]

    def _forget_written(self, batch: Batch) -> None:
        """Pages that a forward pass writes in place leave the prefix cache, as vLLM's do when they are handed out."""
        self.blocks.collect_dropped()  # who reads a page as well may be gone
        for row, contexts in enumerate(batch.contexts):
            if len(contexts) % BLOCK:
                for table in batch.cache.tables:
                    page = int(table.pages[row, len(contexts) // BLOCK])
                    if self.blocks.references[page] == 1:
                        self.prefixes.remove(page)

    def _remember(self, batch: Batch) -> None:
        """Enter the exact blocks of a batch into the prefix cache; pages that hold a shared direction leave it."""
        for group, table in enumerate(batch.cache.tables):
            pages, served = table.pages.tolist(), table.served.tolist()
            for row, contexts in enumerate(batch.contexts):
                for slot in range(len(contexts) // BLOCK):
                    page, context = pages[row][slot], contexts[(slot + 1) * BLOCK - 1]
                    if table.scaled(torch.tensor([row]), torch.tensor([slot])):
                        self.prefixes.remove(page)
                    elif self.contexts.public[context] and not served[row][slot] and page not in self.prefixes:
                        self.prefixes.add([((batch.tenants[row], group), context)], page)
                        self.exact[page] = contexts[slot * BLOCK : (slot + 1) * BLOCK]

    def follow(self) -> None:
        """Hear of freed pages from the pool; to be called once it exists."""
        self.blocks.on_free(lambda pages: [self.prefixes.remove(page) for page in pages.tolist()])
