"""The prefill of prompts on one cache: what is resident is adopted, what is not is computed, and both are compared."""

from __future__ import annotations

import time
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from jointkv.core.moved_text import unwritten
from jointkv.core.reuse import COMPUTED, Found, Integers
from jointkv.errors import BadInput, LayoutError, PoolFull
from jointkv.hf.batch import Batch
from jointkv.hf.paged_cache import PagedCache
from jointkv.hf.prefill_result import PrefillResult, RowPrefill
from jointkv.hf.residents import Matches
from jointkv.hf.reuse import Reuse
from jointkv.hf.row_steps import Forward, ImaginedSteps, RowSteps
from jointkv.hf.threads import alone
from jointkv.policy.reuse import audited, decide


def prompts_of(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row without left padding, on the CPU.

    Raises:
        LayoutError: no tensors, ids that are not whole numbers, not `[rows, length]` both with a row at least, or
            padding that is not on the left.
    """
    for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not (isinstance(given, Tensor) or (given is None and name == "attention_mask")):
            raise LayoutError(f"{name}: prefill needs a tensor, not a {type(given).__name__}: return_tensors='pt'")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise LayoutError(f"input_ids: token ids are whole numbers, not {input_ids.dtype}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.dim() != 2 or mask.shape != input_ids.shape or not len(input_ids):
        raise LayoutError(f"prefill needs ids and mask [rows, length], got {list(input_ids.shape)}, {list(mask.shape)}")
    seen = mask.cpu().bool()
    if (seen[:, :-1] & ~seen[:, 1:]).any():
        raise LayoutError("prefill needs prompts that are padded on the left")
    return [row[kept].contiguous() for row, kept in zip(input_ids.cpu(), seen, strict=True)]


def prefill_row(cache: PagedCache, forward: Forward, tokens: Tensor, tenant: Hashable) -> RowPrefill:
    """Have the empty `cache` hold all but the last of `tokens [n]`, and note what is learnt of pages and licence.

    A fault of reuse switches it off; what is not there yet is computed then.
    """
    steps, pool = RowSteps(cache, forward, tokens), cache.pool
    try:
        if pool.reuse is not None:
            return _reusing(cache, steps, tokens, tenant, pool.reuse)
    except Exception as error:
        if steps.computing or isinstance(error, PoolFull):
            raise
        pool.disable_reuse(error)
    skipped = cache.length if cache.tables and cache.tables[0].served.any() else 0
    steps.finish()
    cache.fuse()
    return RowPrefill(len(tokens), skipped=skipped)


def _reusing(cache: PagedCache, steps: RowSteps, tokens: Tensor, tenant: Hashable, reuse: Reuse) -> RowPrefill:
    ids, blocks = tokens.numpy().astype(np.int64), cache.pool.blocks
    start = time.perf_counter()
    if blocks is not None:
        blocks.collect_dropped()
    matches = steps.matches = reuse.residents.find(tenant, ids[:-1])
    slots = (len(ids) - 1) // reuse.residents.block_size
    steps.moved = reuse.moved_text(tenant, ids[:-1], len(matches.exact), slots)
    reuse.seconds_planning += time.perf_counter() - start
    # Whoever has the sources may drop them at any time, and computing hands out what is free.
    with nullcontext() if blocks is None else blocks.holding(torch.from_numpy(steps.sources)):
        done, true_until = _decided(cache, steps, ids, tenant, reuse)
        start = time.perf_counter()
        _compare(matches, true_until, steps, reuse)
        reuse.seconds_planning += time.perf_counter() - start
    own = cache.tables[0].pages[0, :true_until].numpy().copy()
    cache.fuse()
    _make_resident(cache.batch, own, ids, tenant, reuse)
    _count(done, reuse)
    return done


def _decided(
    cache: PagedCache, steps: RowSteps, ids: Integers, tenant: Hashable, reuse: Reuse
) -> tuple[RowPrefill, int]:
    """Compute and adopt the prompt; what became of it, and how many of its leading blocks are its own or exact."""
    start, matches = time.perf_counter(), steps.matches
    assert matches is not None
    size, slots = reuse.residents.block_size, (len(ids) - 1) // reuse.residents.block_size
    found = matches.found if steps.moved is None else matches.found.beside(steps.moved.found)
    found = found.where((found.slot >= len(matches.exact)) & (found.slot < slots))
    readable = found.where(reuse.permitted(tenant, found.page))
    resident = bool(found.stretches(reuse.rule.least))
    drawn = resident and reuse.draws_audit()
    reuse.seconds_planning += time.perf_counter() - start
    if len(matches.exact):
        steps.adopt(0, matches.exact, exact=True)
    done = RowPrefill(len(ids), exact=len(matches.exact) * size)
    if drawn or (resident and not readable.stretches(reuse.rule.least)):
        steps.finish()
        return _audit(done, found, slots, drawn, steps, tenant, reuse), slots
    plan = decide(readable, len(matches.exact), slots, reuse.rule, steps)
    steps.finish()
    if not plan.skipped:
        return done, slots
    reused = tuple(np.flatnonzero(plan.pages != COMPUTED).tolist())
    moved = int(unwritten(plan.pages).sum()) * size
    done = replace(done, skipped=plan.skipped * size, moved=moved, reused=reused)
    return replace(done, runs=len(plan.reused), gaps=len(plan.gaps)), plan.reused[0].start


def _audit(
    done: RowPrefill, found: Found, slots: int, drawn: bool, steps: RowSteps, tenant: Hashable, reuse: Reuse
) -> RowPrefill:
    """Compare what would have been reused with what was computed; licences are told the share beyond the bounds.

    Args:
        found: what is resident of the blocks before `slots`, whether it may be read or not.
        drawn: see `policy.reuse.audited`.
    """
    elsewhere, first = unwritten(found.page), done.exact // reuse.residents.block_size
    classes = {False: ~elsewhere, True: elsewhere}
    licensed = [moved for moved, its in classes.items() if reuse.permitted(tenant, found.page[its]).any()]
    blocks, missed = {False: 0, True: 0}, {False: 0, True: 0}
    imagined = ImaginedSteps(steps)
    for spoken_of, plan in audited(found, classes, licensed, drawn, first, slots, reuse.rule, imagined):
        read = np.flatnonzero(plan.pages != COMPUTED)
        beyond, moved_there = steps.ratios(read, plan.pages[read]) > 1, unwritten(plan.pages[read])
        for moved in spoken_of:
            its = beyond[moved_there == moved]
            blocks[moved], missed[moved] = len(its), int(its.sum())
            if len(its):
                reuse.observe(tenant, missed[moved] / len(its), moved)
    done = replace(done, audited=True, audited_blocks=sum(blocks.values()), missed_blocks=sum(missed.values()))
    return replace(done, audited_moved=blocks[True], missed_moved=missed[True])


def _compare(matches: Matches, until: int, steps: RowSteps, reuse: Reuse) -> None:
    """Make blocks that were computed behind their true context witnesses of pages with their tokens."""
    chosen = (matches.slot < until) & (matches.slot >= len(matches.exact)) & ~matches.same_context
    slot, page = matches.slot[chosen], matches.page[chosen]
    if len(slot):
        reuse.residents.witness(matches, slot, page, steps.ratios(slot, page))
    if steps.moved is not None:
        found = steps.moved.found
        computed = found.where(found.slot < until)
        ratios, standing = steps.ratios(computed.slot, computed.page), matches.standing[computed.slot]
        steps.moved.testify(reuse.residents.evidence_moved, computed.page, ratios, standing)


def _make_resident(batch: Batch, own: Integers, ids: Integers, tenant: Hashable, reuse: Reuse) -> None:
    """Offer the pages `own` of the leading slots to later prompts, where fusion has left them in place."""
    table = batch.tables[0]
    slots = np.flatnonzero((table.pages[0, : len(own)].numpy() == own) & ~table.served[0, : len(own)].numpy())
    reuse.residents.add(tenant, ids, slots, own[slots], int(batch.sequence[0]))


def _count(found: RowPrefill, reuse: Reuse) -> None:
    reuse.counters.update(
        prompt_tokens_skipped=found.skipped,
        moved_tokens_skipped=found.moved,
        reuse_runs=found.runs,
        reuse_gaps=found.gaps,
        reuse_audits=int(found.audited),
        reuse_audited_blocks=found.audited_blocks,
        reuse_missed_blocks=found.missed_blocks,
    )


@alone
def prefill_rows(
    cache: PagedCache, forward: Forward, prompts: list[Tensor], tenants: list[Hashable], length: int
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
    pool = cache.pool
    if forward.training is not None:
        pool.say_that_it_trains(forward.training)
    if pool.reuse is None or forward.training is not None or length < 1:
        return PrefillResult(tuple(RowPrefill(len(prompt)) for prompt in prompts))
    pool.notice_weights()
    pool.reuse.under(pool.policy)
    rows, found = [], []
    for prompt, tenant in zip(prompts, tenants, strict=True):
        row = PagedCache(pool, [tenant])
        row.waits = True
        rows.append(row)
        # Of a single token nothing is prefilled.
        found.append(prefill_row(row, forward, prompt, forward.key(tenant)) if len(prompt) > 1 else RowPrefill(1))
    cache.join(rows, length)
    return PrefillResult(tuple(found))
