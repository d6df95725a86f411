"""The prefill of prompts on one cache: what is resident is adopted, what is not is computed, and both are compared."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from jointkv.core.blocks import served_errors
from jointkv.core.reuse import COMPUTED, Integers
from jointkv.errors import BadInput, LayoutError
from jointkv.hf.batch import Batch
from jointkv.hf.pool import JointPool
from jointkv.hf.residents import Matches
from jointkv.hf.reuse import Decided, Reuse, decide


@dataclass(frozen=True)
class RowPrefill:
    """What was done for one prompt.

    Attributes:
        tokens: of the prompt.
        exact: tokens whose K and V are resident from the first token on, in blocks; they are read as they are.
        skipped: tokens of blocks behind other contexts that are read instead of being computed.
        reused: slots of these blocks, in order.
        runs, gaps: runs that were adopted, and stretches of computed blocks before reused ones.
        audited: whether it was computed, and compared with what would have been reused.
        audited_blocks, missed_blocks: blocks that would have been, and those of them beyond the bounds.
    """

    tokens: int
    exact: int = 0
    skipped: int = 0
    reused: tuple[int, ...] = ()
    runs: int = 0
    gaps: int = 0
    audited: bool = False
    audited_blocks: int = 0
    missed_blocks: int = 0

    @property
    def computed(self) -> int:
        """Tokens that the model reads, those left to `generate` included."""
        return self.tokens - self.exact - self.skipped


@dataclass(frozen=True)
class PrefillResult:
    """What `JointCache.prefill` did, by row; the properties are sums, see `RowPrefill`."""

    rows: tuple[RowPrefill, ...]

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    @property
    def exact(self) -> int:
        return sum(row.exact for row in self.rows)

    @property
    def skipped(self) -> int:
        return sum(row.skipped for row in self.rows)

    @property
    def computed(self) -> int:
        return sum(row.computed for row in self.rows)

    @property
    def audits(self) -> int:
        """Rows that were computed and compared."""
        return sum(row.audited for row in self.rows)

    @property
    def audited_blocks(self) -> int:
        return sum(row.audited_blocks for row in self.rows)

    @property
    def missed_blocks(self) -> int:
        return sum(row.missed_blocks for row in self.rows)


class RowCache(Protocol):
    """A cache of one prompt, whose blocks are not fused before `fuse`."""

    batch: Batch

    def adopt(self, pages: Tensor, tokens: Tensor, exact: bool) -> None:
        """Go on with the full blocks in resident `pages [n]`, which hold `tokens`; needs whole blocks so far."""

    def fuse(self) -> None:
        """Fuse what was filled."""


class WholeCache(Protocol):
    """An empty cache of several prompts."""

    pool: JointPool

    def row(self, tenant: Hashable) -> Any:
        """A new `RowCache` on the same pool."""

    def join(self, rows: Any, length: int) -> None:
        """Take over the content of `rows`, padded on the left to `length` tokens."""


def prompts_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row without left padding, on the CPU.

    Raises:
        LayoutError: not `[rows, length]` both, or padding that is not on the left.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.dim() != 2 or mask.shape != input_ids.shape:
        raise LayoutError(f"prefill needs ids and mask [rows, length], got {list(input_ids.shape)}, {list(mask.shape)}")
    seen = mask.cpu().bool()
    if (seen[:, :-1] & ~seen[:, 1:]).any():
        raise LayoutError("prefill needs prompts that are padded on the left")
    return [row[kept].contiguous() for row, kept in zip(input_ids.cpu(), seen, strict=True)]


class RowSteps:
    """Computes and adopts one prompt, as `decide` asks for it."""

    def __init__(self, cache: RowCache, model: PreTrainedModel, tokens: Tensor) -> None:
        self._cache, self._model, self._tokens = cache, model, tokens
        self._size = cache.batch.pool.block_size

    @property
    def _done(self) -> int:
        return self._cache.batch.length

    def compute(self, slot: int) -> None:
        self._compute(slot * self._size)

    def finish(self) -> None:
        """Compute all but the last token of the prompt."""
        self._compute(len(self._tokens) - 1)

    def adopt(self, first: int, pages: Integers, exact: bool = False) -> None:
        tokens = self._tokens[first * self._size : (first + len(pages)) * self._size]
        self._cache.adopt(torch.from_numpy(pages), tokens, exact)

    def ratios(self, slots: Integers, pages: Integers) -> NDArray[np.float64]:
        batch = self._cache.batch
        own, rule = batch.tables[0].pages[0, torch.from_numpy(slots)], batch.pool.policy.rule(0)
        errors = served_errors(batch.tables[0].pool.kv, own, torch.from_numpy(pages), rule.across_layers)
        return rule.ratio([error.numpy() for error in errors])

    def _compute(self, end: int) -> None:
        start = self._done
        if end <= start:
            return
        device, place = self._model.device, torch.arange(start, end)
        inputs: dict[str, Any] = {
            "input_ids": self._tokens[None, start:end].to(device),
            "attention_mask": torch.ones(1, end, dtype=torch.long, device=device),
            "position_ids": place[None].to(device),
        }
        self._model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)


class _Imagined:
    """Steps of an audit: everything is computed already, and nothing is adopted."""

    def __init__(self, real: RowSteps) -> None:
        self.ratios = real.ratios

    def compute(self, slot: int) -> None:
        return

    def adopt(self, first: int, pages: Integers) -> None:
        return


def prefill_row(cache: RowCache, model: PreTrainedModel, tokens: Tensor, tenant: Hashable, reuse: Reuse) -> RowPrefill:
    """Have `cache` hold all but the last of `tokens [n]`, and note what is learnt of pages and licence."""
    size, ids = reuse.residents.block_size, tokens.numpy().astype(np.int64)
    start = time.perf_counter()
    matches = reuse.residents.find(tenant, ids[:-1])
    slots = (len(ids) - 1) // size
    audited = matches.runs.next_entry(len(matches.exact), slots, reuse.rule.least + 1) is not None
    audited = audited and reuse.audits_next(tenant)
    reuse.seconds_planning += time.perf_counter() - start
    steps = RowSteps(cache, model, tokens)
    if len(matches.exact):
        steps.adopt(0, matches.exact, exact=True)
    if audited:
        steps.finish()
    decided = decide(matches, slots, reuse.rule, reuse.residents, _Imagined(steps) if audited else steps)
    steps.finish()
    plan = decided.plan
    exact_until = slots if audited or not plan.skipped else plan.reused[0].start
    found = RowPrefill(tokens=len(ids), exact=len(matches.exact) * size)
    start = time.perf_counter()
    if audited:
        found = _audit(found, decided, steps, tenant, reuse)
    elif plan.skipped:
        reused = tuple(np.flatnonzero(plan.pages != COMPUTED).tolist())
        found = RowPrefill(found.tokens, found.exact, plan.skipped * size, reused, len(decided.runs), len(plan.gaps))
    _compare(matches, exact_until, steps, reuse)
    reuse.seconds_planning += time.perf_counter() - start
    own = cache.batch.tables[0].pages[0, :slots].numpy().copy()
    cache.fuse()
    _make_resident(cache.batch, own[:exact_until], ids, tenant, reuse)
    _count(found, reuse)
    return found


def _audit(found: RowPrefill, decided: Decided, steps: RowSteps, tenant: Hashable, reuse: Reuse) -> RowPrefill:
    """Compare what would have been reused with what was computed; the licence is told the share beyond the bounds."""
    pages = decided.plan.pages
    slots = np.flatnonzero(pages != COMPUTED)
    missed = np.zeros(len(pages), bool)
    missed[slots] = steps.ratios(slots, pages[slots]) > 1
    for run in decided.runs:
        inside = slots[(slots >= run.start) & (slots < run.stop)]
        reuse.observe(tenant, float(missed[inside].mean()))
    return RowPrefill(
        found.tokens, found.exact, audited=True, audited_blocks=len(slots), missed_blocks=int(missed.sum())
    )


def _compare(matches: Matches, until: int, steps: RowSteps, reuse: Reuse) -> None:
    """Make blocks that were computed behind their true context witnesses of pages with their tokens."""
    chosen = (matches.slot < until) & (matches.slot >= len(matches.exact)) & ~matches.same_context
    slot, page = matches.slot[chosen], matches.page[chosen]
    if len(slot):
        reuse.residents.witness(page, steps.ratios(slot, page))


def _make_resident(batch: Batch, own: Integers, ids: Integers, tenant: Hashable, reuse: Reuse) -> None:
    """Offer the pages `own` of the leading slots to later prompts, where fusion has left them in place."""
    table = batch.tables[0]
    slots = np.flatnonzero((table.pages[0, : len(own)].numpy() == own) & ~table.served[0, : len(own)].numpy())
    reuse.residents.add(tenant, ids, slots, own[slots], int(batch.sequence[0]))


def _count(found: RowPrefill, reuse: Reuse) -> None:
    reuse.counters.update(
        prompt_tokens_skipped=found.skipped,
        reuse_runs=found.runs,
        reuse_gaps=found.gaps,
        reuse_audits=int(found.audited),
        reuse_audited_blocks=found.audited_blocks,
        reuse_missed_blocks=found.missed_blocks,
    )


def prefill_rows(
    cache: WholeCache, model: PreTrainedModel, prompts: list[Tensor], tenants: list[Hashable], length: int
) -> PrefillResult:
    """Have the empty `cache` hold all but the last token of each of `prompts`; see `JointCache.prefill`.

    Args:
        tenants: isolation keys.
        length: tokens per row then, left padding included.

    Raises:
        BadInput: a prompt has no token.
        PoolFull: `cache` stays empty.
    """
    if any(len(prompt) < 1 for prompt in prompts):
        raise BadInput("prefill: a prompt has no token")
    reuse = cache.pool.reuse
    if reuse is None or length < 1:
        return PrefillResult(tuple(RowPrefill(len(prompt)) for prompt in prompts))
    reuse.under(cache.pool.policy)
    rows, found = [], []
    for prompt, tenant in zip(prompts, tenants, strict=True):
        rows.append(cache.row(tenant))
        one = len(prompt) == 1  # nothing of it is prefilled
        found.append(RowPrefill(1) if one else prefill_row(rows[-1], model, prompt, tenant, reuse))
    cache.join(rows, length)
    return PrefillResult(tuple(found))
