"""The steps of one prompt's prefill: blocks are computed, adopted from resident pages, and compared with them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from jointkv.core.blocks import PagedKV, served_errors
from jointkv.core.bookkeeping import Autocast, autocast_here, under
from jointkv.core.evidence import Known
from jointkv.core.moved_text import MovedText, unwritten
from jointkv.core.reuse import Integers
from jointkv.errors import UnsupportedUse
from jointkv.hf.modes import in_training
from jointkv.hf.moved import MovedBlocks
from jointkv.hf.paged_cache import PagedCache
from jointkv.hf.residents import Matches
from jointkv.policy.reuse import Computed


@dataclass(frozen=True)
class Rounded:
    """Under which isolation key prompts are found that were computed under `torch.autocast`.

    Attributes:
        tenant: isolation key.
        autocast: devices and dtypes.
    """

    tenant: Hashable
    autocast: Autocast


class Forward:
    """The forward pass of a model as its caller has it: under the autocast that is on where this is made.

    Attributes:
        training: a part of the model in training mode, which may make other numbers of the same tokens each time.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.device, self._model, self._autocast = model.device, model, autocast_here()
        self.training = in_training(model)

    def __call__(self, **inputs: Any) -> None:
        with under(self._autocast):
            self._model(**inputs)

    def key(self, tenant: Hashable) -> Hashable:
        """For what is computed alike: under autocast K and V are rounded, and equal text is not equal to the bit."""
        return Rounded(tenant, self._autocast) if self._autocast else tenant


class RowSteps:
    """Computes and adopts one prompt, as `decide` asks for it.

    Attributes:
        computing: whether a forward pass goes on, or broke off.
        matches: where the prompt is resident, once that is known.
        moved: what of it is resident at other positions, likewise.
    """

    def __init__(self, cache: PagedCache, forward: Forward, tokens: Tensor) -> None:
        self._cache, self._forward, self._tokens = cache, forward, tokens
        self.matches: Matches | None = None
        self.moved: MovedText | None = None
        self._size = cache.pool.block_size
        self.computing = False

    def compute(self, slot: int) -> None:
        self._compute(slot * self._size)

    def finish(self) -> None:
        """Compute all but the last token of the prompt."""
        self._compute(len(self._tokens) - 1)

    def adopt(self, first: int, pages: Integers, exact: bool = False) -> None:
        for part in np.split(pages, np.flatnonzero(np.diff(unwritten(pages))) + 1):
            tokens = self._tokens[first * self._size : (first + len(part)) * self._size]
            if len(part) and self.moved is not None and unwritten(part)[0]:
                self._cache.write(self._elsewhere(self.moved).of(part), tokens)
            else:
                self._cache.adopt(torch.from_numpy(part), tokens, exact)
            first += len(part)

    def ratios(self, slots: Integers, pages: Integers) -> NDArray[np.float64]:
        rule, moved = self._cache.pool.policy.rule(0), unwritten(pages)
        own, result = self._cache.tables[0].pages[0, torch.from_numpy(slots)], np.zeros(len(slots))
        if not moved.all():
            errors = served_errors(self._kv, own[~moved], torch.from_numpy(pages[~moved]), rule.across_layers)
            result[~moved] = rule.ratio([error.numpy() for error in errors])
        if self.moved is not None and moved.any():
            errors = self._elsewhere(self.moved).errors(own[moved], pages[moved], rule.across_layers)
            result[moved] = rule.ratio([error.numpy() for error in errors])
        return result

    def known(self, slots: Integers, pages: Integers) -> Known:
        reuse, matches, moved = self._cache.pool.reuse, self.matches, unwritten(pages)
        assert reuse is not None and matches is not None
        if self.moved is None or not moved.any():
            return reuse.residents.known(matches, slots, pages)
        known = reuse.residents.known(matches, slots, np.where(moved, 0, pages))
        known_of = reuse.residents.evidence_moved, reuse.residents.evidence
        elsewhere = self.moved.known(*known_of, pages[moved], matches.standing[slots[moved]])
        for column in ("count", "worst", "new"):
            getattr(known, column)[moved] = getattr(elsewhere, column)
        return known

    @property
    def sources(self) -> Integers:
        """Resident pages that may be read, each once."""
        if self.matches is None:
            return np.zeros(0, np.int64)
        moved = [] if self.moved is None else [self.moved.sources]
        return np.unique(np.concatenate((self.matches.page, self.matches.exact, *moved)))

    def _elsewhere(self, text: MovedText) -> MovedBlocks:
        reuse = self._cache.pool.reuse
        assert reuse is not None and reuse.rotary is not None
        return MovedBlocks(text, self._kv, reuse.rotary)

    @property
    def _kv(self) -> PagedKV:
        blocks = self._cache.pool.blocks
        assert blocks is not None
        return blocks.kv

    def _compute(self, end: int) -> None:
        start = self._cache.length
        if end <= start:
            return
        self.computing = True
        device, place = self._forward.device, torch.arange(start, end)
        inputs: dict[str, Any] = {
            "input_ids": self._tokens[None, start:end].to(device),
            "attention_mask": torch.ones(1, end, dtype=torch.long, device=device),
            "position_ids": place[None].to(device),
        }
        self._forward(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        if self._cache.length != end:
            raise UnsupportedUse(f"prefill: the model has kept {self._cache.length - start} of {end - start} tokens")
        self.computing = False


class ImaginedSteps(Computed):
    """Steps of an audit: everything is computed already, and nothing is adopted."""

    def __init__(self, real: RowSteps) -> None:
        self.ratios, self.known = real.ratios, real.known
