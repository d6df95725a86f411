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
from jointkv.vllm_plugin.scheduler.directions import Directions
from jointkv.vllm_plugin.scheduler.questions import Answer, Gathering, Question, Signing
from jointkv.vllm_plugin.scheduler.requests import TrackedRequest
from jointkv.vllm_plugin.scheduler.searching import Searching
from jointkv.vllm_plugin.scheduler.sharing import Sharing


class Fusion:
    """What is asked and what follows from the answers.

    Args:
        candidates: finds what to ask.
        bounds: are told what is served.
        sharing: carries out.
        audits: learn from the answers.
        statistics: counts.
        signs: whether blocks that keep their pages are signed.
        writes_directions: whether pages are written with what blocks share that keep theirs.

    Attributes:
        directions: writes them.
    """

    def __init__(
        self,
        candidates: Candidates,
        bounds: Bounds,
        sharing: Sharing,
        audits: Audits,
        statistics: Statistics,
        signs: bool = False,
        writes_directions: bool = False,
    ) -> None:
        self._searching, self._writes_directions = Searching() if signs else None, writes_directions
        self.directions = Directions(candidates, bounds, sharing, statistics)
        self.candidates, self.bounds, self.sharing = candidates, bounds, sharing
        self.audits, self.statistics = audits, statistics
        self._again: list[Member] = []
        self._unsigned: list[Member] = []

    def questions(self, output: SchedulerOutput) -> Iterator[Question]:
        """What the workers shall compare after the step that `output` describes."""
        members = list(self._to_compare(output))
        for member in members:
            if member.audit is not None:
                member.audit.outstanding += len(member.candidates) + len(member.moved)
        yield from self.directions.questions()
        if members:
            yield Question([pair for member in members for pair in member.pairs], partial(self._hear, members))

    def signing(self) -> Signing | None:
        """What the workers shall sign after the step that `questions` was asked for, which comes first."""
        members, self._unsigned = [one for one in self._unsigned if self.candidates.unchanged(one)], []
        if not members:
            return None
        self.statistics.add("blocks_signed", len(members))
        return Signing([(member.group, member.page) for member in members], partial(self._hear_signatures, members))

    def gatherings(self) -> list[Gathering]:
        """What the workers shall compare all with all after that step."""
        return self.directions.gatherings()

    def conclude(self, tracked: Iterable[TrackedRequest]) -> None:
        """Audits may be complete although nothing was compared in the end."""
        for request in tracked:
            if request.audit is not None:
                self.audits.conclude_if_complete(request)

    def start_anew(self) -> None:
        """Forget what was to be asked."""
        self._again, self._unsigned = [], []
        self.directions.start_anew()

    def _to_compare(self, output: SchedulerOutput) -> Iterator[Member]:
        """Members with candidates: those that get others than before, then new ones. The rest become resident."""
        again, self._again = self._again, []
        for member in again:
            # The request may have ended or been preempted since, and its page may be another key's by now.
            reason = self._refused(member)
            if reason is None and not (self.candidates.still_resident(member) or self.candidates.try_others(member)):
                reason = "representative_gone"
            if reason is None:
                yield member
            else:
                self.statistics.reject(reason)
        for member in self.candidates.new_members(output):
            if member.candidates or member.moved:
                yield member
            else:
                self._keep(member)

    def _hear(self, members: list[Member], answer: Answer) -> None:
        """Carry out what is allowed. Proposals whose blocks have changed since are dropped."""
        first = 0
        for member in members:
            count, moved = len(member.candidates), len(member.moved)
            part, elsewhere = answer.part(first, count), answer.part(first + count, moved)
            first += count + moved
            if member.audit is not None:
                self._note(member, part, elsewhere)
            if member.fuses and member.candidates:
                self._settle(member, part)
            elif self.candidates.unchanged(member):
                self._keep(member)
        self.conclude({id(member.tracked): member.tracked for member in members}.values())

    def _note(self, member: Member, answer: Answer, elsewhere: Answer) -> None:
        audit, moved = member.audit, member.moved
        assert audit is not None
        audit.outstanding -= len(member.candidates) + len(moved)
        for page, ratio in zip(moved, elsewhere.ratio, strict=True):
            self.audits.note(member.tracked, audit, member.slot, page, float(ratio))
        member.moved = []  # once is enough, whatever else it is compared with
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
        for choice in allowed[answer.cost[allowed].argsort(kind="stable")]:
            page = member.candidates[choice]
            if self.candidates.may_serve(member, page, answer.step):
                self._merge(member, page, answer.step, float(answer.block[choice]), float(answer.token[choice]))
                return
        if self.candidates.try_others(member):
            self._again.append(member)
        elif len(allowed):
            self.statistics.reject("representative_gone")
        else:
            self.statistics.reject("bound")
            self._keep(member)

    def _hear_signatures(self, members: list[Member], signatures: np.ndarray) -> None:
        """Look for pages like those of `members` that no text has found a page for; all can be found from now on.

        In the order in which they were filled: of those that are alike the first one serves.
        """
        for member, signature in zip(members, signatures, strict=True):
            if not self.candidates.unchanged(member) or not np.isfinite(signature).all():
                continue
            searched, member.signature = not member.candidates and self._may_move(member), signature
            if searched:
                self.candidates.search(member)
            self.candidates.make_resident(member)
            if searched and member.candidates:
                self._again.append(member)
            else:
                self._keep(member)

    def _may_move(self, member: Member) -> bool:
        """Whether what stands at the slot of `member` could be given up in the next step."""
        audit, request = member.tracked.audit, member.tracked.request
        exact = audit is not None and audit.chosen and request.num_computed_tokens < request.num_prompt_tokens
        return not exact and self._refused(member) in (None, "not_cached_yet")

    def _refused(self, member: Member) -> str | None:
        return self.sharing.refused(member.tracked, member.epoch, member.group, member.slot, member.page)

    def _merge(self, member: Member, page: int, step: int, block: float, token: float) -> None:
        exact = max(block, token) == 0
        self.sharing.share(member.tracked, member.group, member.slot, page, exact=exact, step=step)
        self.candidates.residents.index.prefer(page)
        self.candidates.give_up(member)
        self.statistics.merged(block)
        if self._searching is not None and member.signature is not None:
            self.statistics.add("blocks_merged_by_signature")
            self._searching.found(member.group)
        if member.of_prompt:  # as in calibration
            self.bounds.served(member.group, block, token)

    def _keep(self, member: Member) -> None:
        self.candidates.make_resident(member)
        if self._is_to_be_signed(member):
            self._unsigned.append(member)
        elif self._writes_directions and member.fuses:
            self.directions.collect(member)
        elif member.of_prompt and member.fuses:
            self.bounds.kept(member.group)

    def _is_to_be_signed(self, member: Member) -> bool:
        if self._searching is None or not member.fuses or member.signature is not None:
            return False
        return self._searching.wants(member.group, member.position)
