"""What of a request's text is resident, and whether it may be reused: licences, audits by chance, witnesses."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from jointkv.core.moved_text import unwritten
from jointkv.core.reuse import Integers
from jointkv.policy.reuse import ReuseRule, Search
from jointkv.policy.worth import Worth
from jointkv.vllm_plugin.scheduler.evidence import Audit
from jointkv.vllm_plugin.scheduler.followers import Followers
from jointkv.vllm_plugin.scheduler.intake import Intake
from jointkv.vllm_plugin.scheduler.licences import Licences, PageClass
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest
from jointkv.vllm_plugin.scheduler.resident_text import ResidentText
from jointkv.vllm_plugin.scheduler.residents import Residents
from jointkv.vllm_plugin.scheduler.sharing import Sharing
from jointkv.vllm_plugin.settings import PluginSettings

GROUP = 0
"""The one KV-cache group there is."""


class LookUp:
    """Looks up requests before they start.

    Args:
        settings: how.
        rule: which blocks.
        residents: what there is.
        followers: hold those for whom more is on its way.
        sharing: knows what vLLM's prefix cache would find.
        licences: whether.

    Attributes:
        draw: a number in [0, 1) by which audits fall on requests; nobody can foresee it.
        worth: whether entry blocks are compared.
    """

    def __init__(
        self,
        settings: PluginSettings,
        rule: ReuseRule,
        residents: Residents,
        followers: Followers,
        sharing: Sharing,
        licences: Licences,
    ) -> None:
        self.settings, self._rule, self._residents = settings, rule, residents
        self._followers, self._sharing, self._licences = followers, sharing, licences
        self.draw = random.Random(os.urandom(16)).random
        self.worth = Worth()

    def intake(self, tracked: TrackedRequest) -> Intake | None:
        """What `tracked` could reuse; None where it may not, nothing is there, an audit is due, or more is on its way.

        Of an audit, and of a request that is held for what is on its way, note is taken.
        """
        if not self.may_reuse(tracked):
            return None
        request = tracked.request
        end = (request.num_tokens - 1) // tracked.block_size
        start = self._sharing.tables.found(request) // tracked.block_size
        text = ResidentText(self._residents, tracked, start, end, GROUP, self._rule.least)
        found = text.found
        resident = int(np.count_nonzero(np.diff(found.slot, prepend=-1)))
        licensed = self._licences.granted(PageClass(tracked.isolation, exact=True))
        if licensed and self._followers.follows(tracked, end, resident):
            return None
        if not found.stretches(self._rule.least):
            return None
        known = text.known(found.slot, found.page)
        permitted = self.permitted(text, found.page)
        if not found.where(permitted).stretches(self._rule.least):
            tracked.audit = self._audit(text, chosen=False)
            return None
        if tracked.private_from is None and self.draw() < self.settings.reuse_audit_rate:
            tracked.audit = self._audit(text, chosen=True)
            return None
        tracked.audit = None
        found, known = found.where(permitted), known.where(permitted)
        plan = self._rule.witnessed(found, known, end)
        runs, slots = self._rule.unwitnessed(found, known, plan), np.unique(found.slot)
        classes = frozenset(self._classes(text, found.page))
        return Intake(tracked, text, runs, slots, end, plan, Search(start), classes, covered=start)

    def is_permitted(self, intake: Intake) -> bool:
        """Whether the licences still stand by which `intake` is to read pages."""
        return all(map(self._licences.granted, intake.classes))

    def may_reuse(self, tracked: TrackedRequest) -> bool:
        """Whether `tracked` may reuse anything at all before it starts."""
        request = tracked.request
        strict = self.settings.isolation == "strict" and not request.cache_salt
        decided = tracked.planned == request.num_preemptions or (tracked.audit is not None and tracked.audit.pages)
        text = request.sampling_params is not None and not request.mm_features
        return text and not strict and not decided and not request.skip_reading_prefix_cache

    def permitted(self, text: ResidentText, pages: Integers) -> NDArray[np.bool_]:
        """Which of the `pages [n]` of `text` a licence allows to read, by their class: bool `[n]`."""
        moved, key = unwritten(pages), text.tracked.isolation
        either = [self._licences.granted(PageClass(key, exact)) for exact in (False, True)]
        allowed = np.array(either)[text.exact(pages).astype(np.int64)]
        if moved.any():
            allowed[moved] = self._licences.granted(PageClass(key, exact=False, moved=True))
        return allowed

    def _classes(self, text: ResidentText, pages: Integers) -> Iterator[PageClass]:
        """Of `pages` of `text`, each once."""
        kinds = np.unique(np.stack((text.exact(pages), unwritten(pages)), 1), axis=0)
        for exact, moved in kinds.tolist():
            yield PageClass(text.tracked.isolation, exact, moved)

    def _audit(self, text: ResidentText, chosen: bool) -> Audit:
        """Of what would be read of `text`; where comparing entry blocks does not pay, seldom of what is behind one."""
        return Audit(self._pages(text), text, chosen, self.worth.pays(text.tracked.isolation))

    def _pages(self, text: ResidentText) -> dict[int, list[int]]:
        """By slot, the pages that would be compared or served."""
        pages: dict[int, list[int]] = {}
        asked = self._rule.asked(text.found, text.known(text.found.slot, text.found.page))
        for slot, page in zip(asked.slot.tolist(), asked.page.tolist(), strict=True):
            pages.setdefault(slot, []).append(page)
        return pages
