"""Reuse before compute: of a request whose text is resident, only what is not is computed.

Hashes that only the request has lead to resident pages of its text, *helpers*, ordinary requests that nobody sees,
compute the gaps before them, and the request itself finds everything in vLLM's prefix cache: workers, kernels and
tables know nothing of it. Where too little is known of pages, a helper first computes all up to the run's entry block,
and the workers compare that block with those of the sources.
"""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from jointkv.policy.reuse import ReuseRule
from jointkv.vllm_plugin.engine.line import in_line, seats, send_ahead
from jointkv.vllm_plugin.engine.steps import started
from jointkv.vllm_plugin.metrics import Statistics
from jointkv.vllm_plugin.scheduler.entry_blocks import EntryBlocks
from jointkv.vllm_plugin.scheduler.fills import Fills
from jointkv.vllm_plugin.scheduler.followers import Followers
from jointkv.vllm_plugin.scheduler.helpers import Helpers
from jointkv.vllm_plugin.scheduler.intake import Helped, Helper, Intake
from jointkv.vllm_plugin.scheduler.intakes import Intakes
from jointkv.vllm_plugin.scheduler.licences import Licences
from jointkv.vllm_plugin.scheduler.loaders import Loaders
from jointkv.vllm_plugin.scheduler.look_up import GROUP, LookUp
from jointkv.vllm_plugin.scheduler.no_room import NoRoom
from jointkv.vllm_plugin.scheduler.requests import Requests, TrackedRequest
from jointkv.vllm_plugin.scheduler.residents import Residents
from jointkv.vllm_plugin.scheduler.sharing import Sharing
from jointkv.vllm_plugin.scheduler.stored import StoredText
from jointkv.vllm_plugin.settings import PluginSettings

WAVES = 4
"""Requests that reuse begin in waves of so many parts of a step's tokens: of each wave the answers come together."""


class Reuse:
    """Decides what requests need not compute, and has their gaps computed.

    Args:
        settings: how.
        rule: which blocks.
        residents: what there is.
        requests: those that take part.
        sharing: carries out.
        licences: whether.
        statistics: counts.
        stored: what outlives the engine, if anything does.

    Attributes:
        intakes: requests on their way in, by name.
        sent: helpers, see there.
        followers: requests that wait for text that another one is computing.
        look_up: says what each could reuse.
        fills: has pages written with text from other positions.
        entry_blocks: decide where too little is known.
        loaders: have prefixes loaded before that.
    """

    def __init__(
        self,
        settings: PluginSettings,
        rule: ReuseRule,
        residents: Residents,
        requests: Requests,
        sharing: Sharing,
        licences: Licences,
        statistics: Statistics,
        stored: StoredText | None = None,
    ) -> None:
        self.requests, self.sharing, self.statistics = requests, sharing, statistics
        self.sent = Helpers()
        self.followers = Followers(requests)
        self.look_up = LookUp(settings, rule, residents, self.followers, sharing, licences)
        self.fills = Fills(sharing, residents, statistics)
        self.intakes = Intakes(self.sent, self.fills.in_place, sharing)
        self.entry_blocks = EntryBlocks(rule, self.look_up, sharing, self.intakes, self.sent, statistics)
        self.loaders = Loaders(stored, self.look_up, sharing.tables, self.sent, rule.least)
        self._started: list[tuple[TrackedRequest, int, list[int]]] = []
        self._no_room = NoRoom(sharing.tables)

    @property
    def helpers(self) -> dict[str, Helper]:
        """By name. Ended ones stay until `forget_ended`."""
        return self.sent.of_name

    def prepare(self, scheduler: Scheduler) -> Request | None:
        """Look up those who may start in the step to come, and send helpers ahead of them.

        At most as many begin as a part of one step can bring to their first answers: of more that begin at once all
        would wait for the last. Those of two steps more wait with what is found for them, so that who follows may pass;
        the rest stays behind. What the store has of a request is loaded before it is looked up.

        Who computes all and finds no room ends the line: vLLM looks at nobody behind it.

        Returns:
            The first one that is not to start in it; None where there is none.
        """
        self.followers.new_step()
        self.loaders.new_step(scheduler.max_num_running_reqs)
        if not scheduler.waiting:
            return None
        start, budget, free = time.perf_counter(), scheduler.max_num_scheduled_tokens, seats(scheduler)
        reach, sent, line = budget // WAVES, dict[str, list[Request]](), in_line(scheduler)
        room, behind, full = self.fills.room(self.intakes.values()), None, False
        while budget > 0 and free > 0 and reach > -2 * scheduler.max_num_scheduled_tokens:
            request = next(line, None)
            if request is None:
                break
            name = request.request_id
            full = self._no_room.goes_on(request, scheduler)
            if full:
                break
            loaders = self._loaders_ahead(request)
            if loaders is not None:
                sent[name] = loaders
                if self.loaders.full:
                    behind = request
                    break
                continue
            intake = self._known(name) or self._take_in(request)
            if intake is not None and not intake.begun and reach > 0 and self.fills.take_room(intake, room):
                intake = self._begin(intake)
            # Who is not looked at may start all the same, and computes everything: better too many than too few.
            if intake is None:
                if name not in self.helpers and name not in self.followers.held:
                    full = self._no_room.begins(request, scheduler)
                    if full:
                        break
                    budget -= request.num_tokens - self.sharing.tables.found(request)
                free -= 1
                continue
            reach -= intake.ahead
            covered, sent[name] = intake.covered, self._send(intake)
            budget -= intake.plan.computed(covered, intake.covered) * intake.tracked.block_size
            free -= len(sent[name]) + (intake.begun and not intake.asked and not intake.helpers)
        self._keep(sent)
        self.fills.in_place.look(self.intakes.values())
        if behind is None and not full and budget > 0 and free > 0:
            behind = next(line, None)
        if any(sent.values()):
            send_ahead(scheduler, sent)
        self.statistics.add("reuse_plan_seconds", time.perf_counter() - start)
        return behind

    def holds(self, request_id: str, computed: int) -> bool:
        """Whether a request that would find `computed` tokens now is to wait."""
        intake = self.intakes.get(request_id)
        if intake is None:
            return request_id in self.followers.held or self.loaders.holds(request_id)
        if intake.short or (not intake.begun and self.fills.needed(intake) > self.sharing.tables.free):
            return False  # there is no room for it, and it keeps its place in the line
        if intake.entry is not None or not intake.begun or self.fills.awaits(intake):
            return True
        block_size = intake.tracked.block_size
        return bool(intake.helpers) and computed < intake.needs * block_size

    def may_start(self, request: Request, computed: int) -> bool:
        """Whether a request that is not to wait may start with what it would find; see `InPlace.may_start`."""
        helper = self.helpers.get(request.request_id)
        intake = self.intakes.get(request.request_id if helper is None else helper.owner)
        return self.fills.in_place.may_start(request, computed, intake)

    def begin(self, output: SchedulerOutput) -> Iterator[Helped]:
        """Note who starts in the step that `output` describes. Must come before anything asks about its blocks.

        Yields:
            Requests that reuse or were loaded for, and what of the tokens that they find helpers have brought.
        """
        self._look_at_started()
        for request_id, computed in started(output):
            helper = self.helpers.get(request_id)
            helped = None if helper is None else self.intakes.get(helper.owner)
            if helper is not None and helped is not None:
                helped.helped += helper.request.num_prompt_tokens - computed
            intake = self.intakes.pop(request_id, None)
            loaded = self.loaders.start(request_id, computed)
            if intake is not None:
                self._start(intake, computed)
            if intake is not None or loaded:
                yield Helped(request_id, 0 if intake is None else min(intake.helped, computed), loaded)

    def _look_at_started(self) -> None:
        """Blocks that helpers have computed are looked at one step after the start; in it the helpers hold them too."""
        for tracked, epoch, slots in self._started:
            if tracked.request.num_preemptions == epoch:
                tracked.late = slots
        self._started = []

    def ended(self, name: str) -> None:
        """A helper has ended, if it is one."""
        helper = self.helpers.get(name)
        if helper is None:
            return
        helper.ended = True
        intake = self.intakes.get(helper.owner)
        if intake is None or name not in intake.helpers:
            return
        intake.helpers.discard(name)
        if intake.entry is not None and helper.end == intake.entry + 1 and not intake.asked:
            self.intakes.let_go(helper.owner)  # it was stopped before its entry block could be compared

    def dismiss(self, request_id: str) -> None:
        """A request has ended."""
        self.intakes.let_go(request_id)
        self.loaders.let_go(request_id)

    def stray(self) -> list[str]:
        """Helpers that nobody waits for any more."""
        return self.sent.stray(ChainMap[str, Any](self.intakes, self.loaders.waiting))

    def start_anew(self) -> None:
        """Let everybody go. Who takes part still finds nothing of what it has adopted."""
        self.followers.start_anew()
        self.fills.start_anew()
        self.entry_blocks.start_anew()
        for request_id in list(self.loaders.waiting):
            self.loaders.let_go(request_id)
        for request_id, intake in list(self.intakes.items()):
            if intake.plan.skipped and request_id in self.requests.active:
                self.sharing.forget(intake.tracked)
            self.intakes.let_go(request_id)

    def _loaders_ahead(self, request: Request) -> list[Request] | None:
        """See `Loaders.ahead_of`."""
        tracked = self.requests.active.get(request.request_id)
        return None if tracked is None or request.request_id in self.intakes else self.loaders.ahead_of(tracked)

    def _known(self, name: str) -> Intake | None:
        """What was found for a request; nothing where pages, or licences, are gone, so that it is looked up anew."""
        intake = self.intakes.get(name)
        if intake is not None and not (intake.asked or intake.helpers):
            gone = not self.look_up.is_permitted(intake) or self.fills.lost(intake) or self._lost(intake)
            if gone:
                self.intakes.look_up_anew(intake)
        return self.intakes.get(name)

    def _lost(self, intake: Intake) -> bool:
        """Whether others took pages that `intake` was to find while it waited for the room that there is by now."""
        if not intake.begun or intake.entry is not None or intake.gap_ends or self.fills.awaits(intake):
            return False
        tables, request = self.sharing.tables, intake.tracked.request
        found = tables.found_pages(request)
        return len(found) < intake.needs and tables.needed(request, found) <= tables.free

    def _take_in(self, request: Request) -> Intake | None:
        """Look up a request that has not been yet. None where it computes all, or waits for another's text."""
        name, tracked = request.request_id, self.requests.active.get(request.request_id)
        if tracked is None:
            return None
        intake = self.look_up.intake(tracked)
        if intake is not None:
            self.intakes[name], intake.helped = intake, tracked.helped
            self.entry_blocks.begin(intake)
        if name not in self.intakes and name not in self.followers.held:
            self.followers.add_donor(tracked)
        return self.intakes.get(name)

    def _keep(self, names: Iterable[str]) -> None:
        """What those who have begun will find is handed out last, and of that what the first in the line will.

        They wait for pages for the rest, while others take those that have been free the longest.
        """
        for name in reversed(list(names)):
            intake = self.intakes.get(name)
            if intake is not None and intake.begun:
                self.sharing.tables.renew(self.fills.kept(intake))

    def _begin(self, intake: Intake) -> Intake | None:
        """The turn of `intake` has come; what is resident by now counts, not what was when it was looked up."""
        if not intake.text.is_whole:
            self.intakes.look_up_anew(intake)
            found = self._take_in(intake.tracked.request)
        else:
            found = intake
        if found is not None:
            found.begun = True
        return found

    def _send(self, intake: Intake) -> list[Request]:
        """Helpers to send ahead, if any are due: behind pages that are there."""
        if intake.asked or intake.helpers or not intake.begun:
            return []
        self.fills.place(intake, self.intakes.values())
        if intake.short or self.fills.awaits(intake):
            return []
        made = [helper.request for helper in self.sent.make(intake, self.sharing.tables.pool.hash_block_size)]
        self.statistics.add("reuse_helpers", len(made))
        return made

    def _start(self, intake: Intake, computed: int) -> None:
        """The request starts and has found `computed` tokens."""
        tracked, plan, blocks = intake.tracked, intake.plan, computed // intake.tracked.block_size
        (table,) = self.sharing.tables.of([tracked.request.request_id])[tracked.request.request_id]
        adopted = intake.adopted(table[:blocks])
        tracked.served |= {(GROUP, slot) for slot in adopted}
        tracked.next_slot = max(tracked.next_slot, blocks)
        late = sorted(set(range(blocks)) - set(adopted))
        self._started.append((tracked, tracked.request.num_preemptions, late))
        self.statistics.add("prompt_tokens_skipped", len(adopted) * tracked.block_size)
        self.statistics.add("moved_tokens_skipped", len(intake.filled.intersection(adopted)) * tracked.block_size)
        self.statistics.add("blocks_in_place", len(intake.in_place.keys() & set(adopted)))
        self.statistics.add("reuse_gaps", len(plan.gaps))
