"""Fusion after compute: asks the workers about newly filled blocks and, one verdict later, frees the duplicates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput

from jointkv.vllm_plugin.messages import PATIENCE, Inquiry, Verdict
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.bounds import Bounds
from jointkv.vllm_plugin.scheduler.candidates import Candidates, Member
from jointkv.vllm_plugin.scheduler.sharing import Sharing


class Fusion:
    """What was asked and what follows from the answers.

    Args:
        candidates: finds what to ask.
        bounds: decides.
        sharing: carries out.
        statistics: counts.
    """

    def __init__(self, candidates: Candidates, bounds: Bounds, sharing: Sharing, statistics: Statistics) -> None:
        self.candidates, self.bounds, self.sharing, self.statistics = candidates, bounds, sharing, statistics
        self.asked: dict[int, tuple[list[Member], np.ndarray]] = {}
        """By step, the oldest first: members, and the KV-cache group of each of their pairs, `[n]`."""
        self._again: list[Member] = []

    def ask(self, inquiry: Inquiry, output: SchedulerOutput) -> None:
        """Add to `inquiry` what the workers shall compare after the step that `output` describes.

        Raises:
            RuntimeError: a verdict is lost.
        """
        self._expect_none_before(inquiry.step - PATIENCE)
        members = list(self._to_compare(output))
        if members:
            pairs = [(member.group, member.page, page) for member in members for page in member.candidates]
            inquiry.group, inquiry.own, inquiry.other = np.array(pairs, np.int64).T
            self.asked[inquiry.step] = members, inquiry.group

    def settle(self, verdict: Verdict) -> None:
        """Carry out what a verdict allows. Proposals whose blocks have changed since are dropped.

        So is a verdict on what was never asked, or is no longer to be done: it came twice, or fusion was off meanwhile.

        Raises:
            LayoutError, IntegrityError: see `Verdict.check`.
            RuntimeError: the verdict before this one was lost.
        """
        if verdict.step not in self.asked:
            return
        members, groups = self.asked.pop(verdict.step)
        self._expect_none_before(verdict.step)
        verdict.check(len(groups))
        self.statistics.add("compare_seconds", verdict.seconds)
        self.statistics.add("apply_seconds", verdict.apply_seconds)
        allowed = self.bounds.allowed(groups, verdict)
        block, token = np.maximum(verdict.key_error, verdict.value_error), verdict.token_error
        first = 0
        for member in members:
            pairs = slice(first, first + len(member.candidates))
            self._settle(member, verdict.step, np.flatnonzero(allowed[pairs]), block[pairs], token[pairs])
            first = pairs.stop

    def start_anew(self) -> None:
        """Forget what was asked; answers that still come are passed over."""
        self.asked, self._again = {}, []

    def _expect_none_before(self, step: int) -> None:
        """Verdicts come in the order of the inquiries. Raises RuntimeError when there is none on one before `step`."""
        oldest = next(iter(self.asked), step)
        if oldest < step:
            raise RuntimeError(f"the verdict of step {oldest} is lost")

    def _to_compare(self, output: SchedulerOutput) -> Iterator[Member]:
        """Members with candidates: those that get others than before, then new ones. The rest become resident."""
        again, self._again = self._again, []
        for member in again:
            if self.candidates.still_resident(member):
                yield member
            else:
                self.statistics.reject("representative_gone")
        for member in self.candidates.new_members(output):
            if member.candidates:
                yield member
            else:
                self._keep(member)

    def _settle(self, member: Member, step: int, allowed: np.ndarray, block: np.ndarray, token: np.ndarray) -> None:
        """Of the candidates that may serve `member`, by their places in it, the nearest that is still there does."""
        reason = self.sharing.refused(member.tracked, member.epoch, member.group, member.slot, member.page)
        if reason is not None:
            self.statistics.reject(reason)
            return
        for choice in allowed[block[allowed].argsort(kind="stable")]:
            page = member.candidates[choice]
            if self.candidates.unchanged_since(page, step):
                self._merge(member, page, step, float(block[choice]), float(token[choice]))
                return
        if len(allowed):
            self.statistics.reject("representative_gone")
        elif self.candidates.try_others(member):
            self._again.append(member)
        else:
            self.statistics.reject("bound")
            self._keep(member)

    def _merge(self, member: Member, page: int, step: int, block: float, token: float) -> None:
        exact = max(block, token) == 0
        self.sharing.share(member.tracked, member.group, member.slot, page, exact=exact, step=step)
        self.candidates.index.prefer(page)
        self.statistics.merged(block)
        if member.of_prompt:  # as in calibration
            self.bounds.served(member.group, block, token)

    def _keep(self, member: Member) -> None:
        self.candidates.make_resident(member)
        if member.of_prompt:
            self.bounds.kept(member.group)
