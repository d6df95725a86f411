"""Runs of which too little is known: their entry blocks are computed, compared, and decide what is adopted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput

from jointkv.core.moved_text import unwritten
from jointkv.core.reuse import Run, stretches
from jointkv.policy.reuse import ReuseRule
from jointkv.policy.worth import Worth
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.evidence import Audit
from jointkv.vllm_plugin.scheduler.helpers import Helpers
from jointkv.vllm_plugin.scheduler.intake import Intake
from jointkv.vllm_plugin.scheduler.intakes import Intakes
from jointkv.vllm_plugin.scheduler.look_up import GROUP, LookUp
from jointkv.vllm_plugin.scheduler.questions import Answer, Question
from jointkv.vllm_plugin.scheduler.sharing import Sharing


class EntryBlocks:
    """Decides run by run what requests adopt.

    Args:
        rule: which blocks.
        look_up: says which a licence allows.
        sharing: carries out.
        intakes: requests on their way in; those for whom nothing is found leave.
        sent: helpers, which compute the entry blocks.
        statistics: counts.
    """

    def __init__(
        self,
        rule: ReuseRule,
        look_up: LookUp,
        sharing: Sharing,
        intakes: Intakes,
        sent: Helpers,
        statistics: Statistics,
    ) -> None:
        self._rule, self._look_up, self._sharing = rule, look_up, sharing
        self._intakes, self._sent, self._statistics = intakes, sent, statistics
        self._least = rule.least + 1
        """Blocks of a run whose entry block is compared: it itself and what is skipped behind it."""

    def begin(self, intake: Intake) -> None:
        """Adopt what is known well enough as it is, and turn to the first run of which it is not, if that pays."""
        self._adopt(intake, intake.plan.reused)
        if self._next_entry(intake) is not None and not self._look_up.worth.pays(intake.tracked.isolation):
            intake.search.at = intake.end
        self._advance(intake)

    def questions(self, output: SchedulerOutput) -> Iterator[Question]:
        """Entry blocks that the step that `output` describes completes, and their sources' pages."""
        for name, helper in self._sent.of_name.items():
            scheduled, intake = output.num_scheduled_tokens.get(name), self._intakes.get(helper.owner)
            if scheduled is None or intake is None or intake.entry is None or helper.end != intake.entry + 1:
                continue
            if intake.asked:
                continue  # it was preempted before the answer came, and computes the block again
            if helper.request.num_computed_tokens + scheduled < helper.request.num_prompt_tokens:
                continue
            held = self._sharing.tables.block(name, GROUP, intake.entry)
            assert held is not None
            intake.sources = [run for run in intake.sources if intake.text.holds(run)[0]]
            if intake.sources:
                intake.asked = True
                pairs = [intake.text.pair(GROUP, held.block_id, int(run.pages[0])) for run in intake.sources]
                yield Question(pairs, partial(self._hear, intake, list(intake.sources)))
            elif intake.plan.skipped:
                intake.search.refused(intake.entry)
                self._advance(intake)
            else:
                self._intakes.look_up_anew(intake)

    def start_anew(self) -> None:
        """What comparisons have brought so far says nothing of what will be resident."""
        self._look_up.worth = Worth()

    def _advance(self, intake: Intake) -> None:
        """Turn to the next run; if there is none and nothing is reused, let the request go."""
        intake.entry = self._next_entry(intake)
        if intake.entry is not None:
            intake.sources = intake.runs.through(intake.entry, intake.end, self._least, self._rule.sources)
        elif not intake.plan.skipped and intake.text.is_whole:
            intake.tracked.audit = Audit()
            self._intakes.let_go(intake.tracked.request.request_id)
        elif not intake.plan.skipped:
            self._intakes.look_up_anew(intake)

    def _next_entry(self, intake: Intake) -> int | None:
        return intake.runs.next_entry(intake.search.at, intake.end, self._least)

    def _hear(self, intake: Intake, sources: list[Run], answer: Answer) -> None:
        """The entry block has been compared with those of `sources`: adopt what may be."""
        if self._intakes.get(intake.tracked.request.request_id) is not intake:
            return
        assert intake.asked and intake.entry is not None
        intake.asked = False
        if intake.tracked.is_exact(intake.entry):  # else it says nothing of what the model computes
            held = np.array([intake.text.holds(run)[0] for run in sources], bool)
            pages = np.array([run.pages[0] for run in sources])[held]
            intake.text.testify(np.full(len(pages), intake.entry), pages, answer.ratio[held])
        nearest = self._rule.serving(sources, answer.ratio)
        self._follow(intake, intake.entry, sources[nearest].behind, float(answer.ratio[nearest]))
        self._advance(intake)

    def _follow(self, intake: Intake, entry: int, run: Run, ratio: float) -> None:
        """Adopt what may be read of `run`, whose entry block is that far."""
        known = intake.text.known(np.arange(run.first, run.end), run.pages)
        permitted = self._look_up.permitted(intake.text, run.pages) & intake.text.holds(run)
        before = intake.plan
        intake.plan = self._rule.behind(before, run, known, ratio, permitted)
        intake.search.heard(entry, before, intake.plan)
        new = intake.plan.pages != before.pages
        self._look_up.worth.compared(intake.tracked.isolation, int(new.sum()) * intake.tracked.block_size)
        self._adopt(intake, stretches(new))

    def _adopt(self, intake: Intake, new: Iterable[range]) -> None:
        """Lead the request to the pages of its plan; those that are not written yet are when its turn has come."""
        for stretch in new:
            pages = intake.plan.pages[stretch.start : stretch.stop]
            for part in stretches(~unwritten(pages)):
                first = stretch.start + part.start
                self._sharing.adopt(intake.tracked, GROUP, first, pages[part.start : part.stop].tolist())
            self._statistics.add("reuse_runs")
