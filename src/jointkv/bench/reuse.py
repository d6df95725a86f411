"""What compute reuse did while requests were served, from the plugin's counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jointkv.bench.record import Record

SKIPPED = "jointkv_prompt_tokens_skipped_total"
COUNTERS = {
    "skipped_tokens": SKIPPED,
    "runs": "jointkv_reuse_runs_total",
    "gaps": "jointkv_reuse_gaps_total",
    "helpers": "jointkv_reuse_helpers_total",
    "audits": "jointkv_reuse_audits_total",
    "audited_blocks": "jointkv_reuse_audited_blocks_total",
    "missed_blocks": "jointkv_reuse_missed_blocks_total",
    "licences_granted": "jointkv_licences_granted_total",
    "licences_lost": "jointkv_licences_lost_total",
}
HELD = "jointkv_licences.granted"
PLAN_SECONDS = "jointkv_reuse_plan_seconds_total"


class Reuse(Record):
    """Counted from the beginning to the end of a run, or of what was served before one.

    Attributes:
        skipped_tokens: of prompts, read from resident pages instead of computed.
        runs, gaps, helpers: of the requests that skipped some.
        audits: runs that were computed all the same and compared.
        audited_blocks, missed_blocks: of them, and how many of these were beyond the bounds.
        licences_granted, licences_lost: in this time.
        licences: held at the end, whether audits here have earned them or those of a profile.
        audits_until_licence: all since the server's start when its first licence was seen, which is granted here; at
            most those of one reading too many. None where none was granted, or one before.
        plan_seconds: spent on plans.
    """

    skipped_tokens: int
    runs: int
    gaps: int
    helpers: int
    audits: int
    audited_blocks: int
    missed_blocks: int
    licences_granted: int
    licences_lost: int
    licences: int
    audits_until_licence: int | None
    plan_seconds: float

    @property
    def miss_rate(self) -> float | None:
        """Part of the audited blocks that were beyond the bounds; None where none was audited."""
        return self.missed_blocks / self.audited_blocks if self.audited_blocks else None


class Warmup(Record):
    """What was served before a run and is no part of it: requests of the same traffic, whose pages stay resident.

    Attributes:
        seconds: it took.
        reuse: what it did meanwhile; None where nothing counts that.
    """

    requests: int
    seconds: float
    reuse: Reuse | None


def reuse_of(pages: Sequence[Mapping[str, float]]) -> Reuse | None:
    """From the metrics of a server in the order of time; None where it counts no reuse."""
    first, last = pages[0], pages[-1]
    if not any(_is(name, SKIPPED) for name in last):
        return None
    counts = {field: round(total(last, name) - total(first, name)) for field, name in COUNTERS.items()}
    granted = COUNTERS["licences_granted"]
    licensed = next((page for page in pages if total(page, granted)), None)
    return Reuse(
        **counts,
        licences=round(total(last, HELD)),
        audits_until_licence=None
        if licensed is None or total(first, granted)
        else round(total(licensed, COUNTERS["audits"])),
        plan_seconds=total(last, PLAN_SECONDS) - total(first, PLAN_SECONDS),
    )


def total(page: Mapping[str, float], metric: str) -> float:
    """A metric over all its labels, which `jointkv.bench.watch.parse` has put behind its name; 0 where it is not."""
    return sum(value for name, value in page.items() if _is(name, metric))


def _is(name: str, metric: str) -> bool:
    return name == metric or name.startswith(f"{metric}.")
