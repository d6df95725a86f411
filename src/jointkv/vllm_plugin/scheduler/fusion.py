"""Fusion after compute: asks the workers about newly filled blocks and, one verdict later, frees the duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput

from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.audits import Audits
from jointkv.vllm_plugin.scheduler.bounds import Bounds
from jointkv.vllm_plugin.scheduler.candidates import Candidates, Member
from jointkv.vllm_plugin.scheduler.questions import Answer, Question
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest
from jointkv.vllm_plugin.scheduler.sharing import Sharing


class Fusion:
    """What is asked and what follows from the answers.

    Args:
        candidates: finds what to ask.
        bounds: are told what is served.
        sharing: carries out.
        audits: learn from the answers.
        statistics: counts.
    """

    def __init__(
        self, candidates: Candidates, bounds: Bounds, sharing: Sharing, audits: Audits, statistics: Statistics
    ) -> None:
        self.candidates, self.bounds, self.sharing = candidates, bounds, sharing
        self.audits, self.statistics = audits, statistics
        self._again: list[Member] = []

    def questions(self, output: SchedulerOutput) -> Iterator[Question]:
        """What the workers shall compare after the step that `output` describes."""
        members = list(self._to_compare(output))
        for member in members:
            if member.audit is not None:
                member.audit.outstanding += len(member.candidates)
        if members:
            pairs = [(member.group, member.page, page) for member in members for page in member.candidates]
            yield Question(pairs, partial(self._hear, members))

    def conclude(self, tracked: Iterable[TrackedRequest]) -> None:
        """Audits may be complete although nothing was compared in the end."""
        for request in tracked:
            if request.audit is not None:
                self.audits.conclude_if_complete(request)

    def start_anew(self) -> None:
        """Forget what was to be asked."""
        self._again = []

    def _to_compare(self, output: SchedulerOutput) -> Iterator[Member]:
        """Members with candidates: those that get others than before, then new ones. The rest become resident."""
        again, self._again = self._again, []
        for member in again:
            # The request may have ended or been preempted since, and its page may be another key's by now.
            reason = self._refused(member)
            if reason is None and not self.candidates.still_resident(member):
                reason = "representative_gone"
            if reason is None:
                yield member
            else:
                self.statistics.reject(reason)
        for member in self.candidates.new_members(output):
            if member.candidates:
                yield member
            else:
                self._keep(member)

    def _hear(self, members: list[Member], answer: Answer) -> None:
        """Carry out what is allowed. Proposals whose blocks have changed since are dropped."""
        first = 0
        for member in members:
            part = answer.part(first, len(member.candidates))
            first += len(member.candidates)
            if member.audit is not None:
                self._note(member, part)
            if member.fuses:
                self._settle(member, part)
            elif self.candidates.unchanged_since(member.page, answer.step):
                self._keep(member)
        self.conclude({id(member.tracked): member.tracked for member in members}.values())

    def _note(self, member: Member, answer: Answer) -> None:
        audit = member.audit
        assert audit is not None
        audit.outstanding -= len(member.candidates)
        for page, ratio in zip(member.candidates, answer.ratio, strict=True):
            if self.candidates.unchanged_since(page, answer.step):
                self.audits.note(member.tracked, audit, member.slot, page, float(ratio))
        request = member.tracked.request
        if audit.chosen and request.num_computed_tokens < request.num_prompt_tokens:
            member.fuses = False  # what comes behind it is to be computed exactly

    def _settle(self, member: Member, answer: Answer) -> None:
        """Of the candidates that may serve `member`, the nearest that is still there does."""
        reason = self._refused(member)
        if reason is not None:
            self.statistics.reject(reason)
            return
        allowed = np.flatnonzero(answer.allowed)
        for choice in allowed[answer.block[allowed].argsort(kind="stable")]:
            page = member.candidates[choice]
            if self.candidates.unchanged_since(page, answer.step):
                self._merge(member, page, answer.step, float(answer.block[choice]), float(answer.token[choice]))
                return
        if len(allowed):
            self.statistics.reject("representative_gone")
        elif self.candidates.try_others(member):
            self._again.append(member)
        else:
            self.statistics.reject("bound")
            self._keep(member)

    def _refused(self, member: Member) -> str | None:
        return self.sharing.refused(member.tracked, member.epoch, member.group, member.slot, member.page)

    def _merge(self, member: Member, page: int, step: int, block: float, token: float) -> None:
        exact = max(block, token) == 0
        self.sharing.share(member.tracked, member.group, member.slot, page, exact=exact, step=step)
        self.candidates.residents.index.prefer(page)
        self.statistics.merged(block)
        if member.of_prompt:  # as in calibration
            self.bounds.served(member.group, block, token)

    def _keep(self, member: Member) -> None:
        self.candidates.make_resident(member)
        if member.of_prompt and member.fuses:
            self.bounds.kept(member.group)
