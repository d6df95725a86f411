"""What the plugin counts; `prometheus.py` has it appear in vLLM's own `/metrics`.

Names and units are listed in `COUNTERS`, kept beside the scheduler, and in `WORKER_COUNTERS` and `STORE_COUNTERS`,
which every worker keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypedDict

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

COUNTERS = {
    "blocks_considered": "Newly filled KV blocks, of one layer group, that were looked up among resident ones.",
    "blocks_merged": "KV blocks, of one layer group, that are read from another request's page since.",
    "blocks_merged_by_signature": "Those of them that were found by their content, whatever the text.",
    "blocks_merged_by_direction": "Those that read a direction written for them and others.",
    "directions_written": "Pages that were written with the direction that blocks share.",
    "blocks_signed": "KV blocks, of one layer group, whose signatures were taken.",
    "blocks_searched": "Searches for resident pages by the signature of a block.",
    "pages_freed": "Pages, of one layer group, given back to the pool by merging.",
    "isolation_refusals": "Blocks left alone because strict isolation is on and the request has no cache_salt.",
    "compare_seconds": "Seconds workers spent comparing K and V, and taking signatures.",
    "sign_seconds": "Those of them spent taking signatures.",
    "schedule_seconds": "Seconds the scheduler spent choosing blocks and carrying out verdicts.",
    "search_seconds": "Those of the scheduler's seconds spent searching by signatures.",
    "apply_seconds": "Seconds workers spent replacing block table entries and writing pages of text that moved.",
    "bounds_tightened": "Times the bound of a layer group was tightened, because errors were above the profile's.",
    "bounds_loosened": "Times it was loosened again, inside the user's bound.",
    "prompt_tokens_skipped": "Tokens of prompts that were not computed, because the same text was resident.",
    "moved_tokens_skipped": "Those of them that were resident at another position, and were copied or read there.",
    "pages_filled": "Pages that were written with text from other positions.",
    "blocks_in_place": "Blocks of prompts that read text from other positions where it is.",
    "reuse_runs": "Stretches of prompts that were read before compute.",
    "reuse_gaps": "Stretches of prompts that were computed before or between reused blocks.",
    "reuse_helpers": "Requests of the plugin's own that computed such stretches; no client sees them.",
    "reuse_audits": "Requests that could have reused, were computed, and were compared; one for each class of pages.",
    "reuse_audited_blocks": "Blocks of audited requests that would have been reused.",
    "reuse_missed_blocks": "Those of them that would have been beyond the bounds.",
    "reuse_plan_seconds": "Seconds the scheduler spent looking for runs and sending helpers.",
    "licences_granted": "Licences to reuse that audits have earned.",
    "licences_lost": "Licences to reuse that audits have ended.",
    "store_hits": "Requests of which the store had more than the prefix cache; that was loaded instead of computed.",
    "store_misses": "Requests of which it had no more.",
    "store_tokens_loaded": "Tokens of prompts that were to be loaded from the store instead of computed.",
    "store_faults": "Errors, each of which ends the use of the store until the engine is started again.",
    "faults": "Internal errors, each of which switches fusion off for a while or for good.",
}
STORE_COUNTERS = {
    "store_pages_written": "Pages written to the store.",
    "store_bytes_written": "Bytes of them in the store.",
    "store_pages_dropped": "Pages that were not written, because too many waited for the disk.",
    "store_pages_read": "Pages that were filled from the store.",
    "store_bytes_read": "Bytes of them in the store.",
    "store_pages_lost": "Pages that were to be filled from the store and were computed, because not all was whole.",
}
WORKER_COUNTERS = {
    "attention_steps": "Steps of a layer group on a worker whose attention can read shared pages once.",
    "attention_shared_steps": "Those of them in which it did.",
    "attention_faults": "Errors, each of which leaves the attention of a layer group on a worker to vLLM for good.",
}
LEFT_ALONE = {
    "opted_out": "it opted out",
    "not_understood": "its extra argument jointkv is neither true nor false",
    "prompt_logprobs": "it asks for log-probabilities of its prompt, which sharing would move",
    "not_tokens": "its prompt is not made of tokens alone, or still grows",
    "no_salt": "isolation is strict and it has no cache_salt",
    "short": "it ended before a block was full",
    "pool_usage": "less of the KV pool than min_pool_usage was in use while it ran",
}
"""Why a request shared nothing without being tried."""
NO_REUSE = {
    "scheduler": "the scheduler is another class",
    "prefix_caching": "prefix caching is off",
    "kv_cache_groups": "the model has several KV-cache groups, such as sliding windows beside full attention",
    "connectors": "other KV connectors stand beside jointkv's",
}
"""What keeps an engine from reuse where nobody has switched it off."""
NEWS = (
    *("blocks_considered", "isolation_refusals", "prompt_tokens_skipped", "reuse_audits", "faults"),
    *("store_hits", "store_misses", "store_faults"),
)
"""Counters that do not wait for a full report."""
REPORT_EVERY = 64
"""Steps between two full reports."""
REASONS = {
    "bound": "no resident block was within the bounds",
    "page_shared": "an exact prefix that other requests hold too",
    "request_gone": "the request finished or was preempted meanwhile",
    "entry_changed": "the block table entry changed meanwhile",
    "not_cached_yet": "the prefix cache has not taken the block in yet",
    "no_free_page": "the pool has no free page for a direction that blocks share beside one for every running request",
    "representative_gone": "the resident page was handed out again meanwhile",
}
ERROR_BUCKETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1.0)
READERS = ("1", "2", "3-4", "5-8", "9-16", "17+")
STATES = ("inert", "active", "recovering", "disabled", "off")
GAUGES = ("shared", "state", "licences", "no_reuse")
LICENCE_STATES = ("earning", "granted", "lost")


def readers_of(count: int) -> str:
    """The label in `READERS` for a page that `count` table entries read."""
    for label in READERS[:-1]:
        if count <= int(label.split("-")[-1]):
            return label
    return READERS[-1]


class LicenceGauges(TypedDict):
    """What is shown of the licences to reuse.

    Attributes:
        allowed: share of reused blocks that may be beyond the bounds.
        states: licences by state, one of `LICENCE_STATES`.
        classes: state and upper confidence limit, by class of run.
    """

    allowed: float
    states: dict[str, int]
    classes: dict[str, tuple[str, float]]


class JointStats(KVConnectorStats):
    """What happened since the last report: counts, rejections, errors of merged blocks; gauges: `GAUGES`."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> JointStats:
        """Add a later report; gauges take its value."""
        for name in ("counters", "rejected", "left_alone"):
            total = Counter(self.data.get(name, {}))
            total.update(other.data.get(name, {}))
            self.data[name] = dict(total)
        self.data["errors"] = [*self.data.get("errors", ()), *other.data.get("errors", ())]
        for gauge in GAUGES:
            if gauge in other.data:
                self.data[gauge] = other.data[gauge]
        return self

    def reduce(self) -> dict[str, int | float]:
        """One line for vLLM's log."""
        counters = self.data.get("counters", {})
        names = ("blocks_considered", "blocks_merged", "prompt_tokens_skipped")
        line = {f"jointkv {name}": counters.get(name, 0) for name in names}
        return {**line, "jointkv rejected": sum(self.data.get("rejected", {}).values())}


class Statistics:
    """Totals since the start, and what is new since the last report.

    Attributes:
        no_reuse: why the engine cannot reuse, one of `NO_REUSE`; None where it can or need not.
    """

    def __init__(self) -> None:
        self.no_reuse: str | None = None
        self._totals: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self._reported_rejected: Counter[str] = Counter()
        self._left_alone: Counter[str] = Counter()
        self._reported_left_alone: Counter[str] = Counter()
        self._reported_state: str | None = None
        self._errors: list[float] = []

    def add(self, name: str, amount: float = 1) -> None:
        """Count `amount` more of `name`, one of `COUNTERS`."""
        self._totals[name] += amount  # type: ignore[assignment]  # a Counter of seconds is a Counter all the same

    def reject(self, reason: str) -> None:
        """Count a block that keeps its page for `reason`, one of `REASONS`."""
        self._rejected[reason] += 1

    def leave_alone(self, reason: str) -> bool:
        """Count a request that shares nothing for `reason`, one of `LEFT_ALONE`; whether it is the first."""
        self._left_alone[reason] += 1
        return self._left_alone[reason] == 1

    def merged(self, error: float, frees: bool = True) -> None:
        """Count a merged block, its relative error, and where it `frees` one more page than were taken, that page."""
        self.add("blocks_merged")
        self.add("pages_freed", frees)
        self._errors.append(error)

    def totals(self) -> dict[str, Any]:
        """Everything counted so far, with `rejected` blocks and `left_alone` requests by reason."""
        by_reason = {"rejected": dict(self._rejected), "left_alone": dict(self._left_alone)}
        return {**{name: self._totals[name] for name in COUNTERS}, **by_reason}

    def has_news(self, state: str) -> bool:
        """Whether a block was looked at, reused or audited, a request left alone, or an error or a state is new."""
        counted = any(self._totals[name] != self._reported[name] for name in NEWS)
        left_alone = self._left_alone != self._reported_left_alone
        return counted or left_alone or bool(self._errors) or state != self._reported_state

    def take(self, state: str, shared: Counter[int] | None, licences: LicenceGauges | None = None) -> JointStats:
        """What is new since the last call, with the present state, pages by readers and licences."""
        data: dict[str, Any] = {
            "counters": dict(self._totals - self._reported),
            "rejected": dict(self._rejected - self._reported_rejected),
            "left_alone": dict(self._left_alone - self._reported_left_alone),
            "errors": self._errors,
            "state": state,
        }
        if shared is not None:
            pages: Counter[str] = Counter()
            for count, number in shared.items():
                pages[readers_of(count)] += number
            data["shared"] = {label: pages[label] for label in READERS}
            if self.no_reuse is not None:
                data["no_reuse"] = self.no_reuse
        if licences is not None:
            data["licences"] = licences
        self._reported, self._reported_rejected, self._errors = Counter(self._totals), Counter(self._rejected), []
        self._reported_left_alone, self._reported_state = Counter(self._left_alone), state
        return JointStats(data)


class WorkerStatistics:
    """What a worker has reported of its attention, and of its store."""

    def __init__(self) -> None:
        self._reported: Counter[str] = Counter()

    def take(self, counts: Iterable[Counter[str]]) -> JointStats | None:
        """What is new since the last report; None where it can wait.

        Args:
            counts: of each layer group and of the store, since the start.
        """
        totals = sum(counts, Counter[str]())
        new = totals - self._reported
        news = new["attention_faults"] or any(new[name] for name in (*STORE_COUNTERS, "store_faults"))
        if new["attention_steps"] < REPORT_EVERY and not news:
            return None
        self._reported = totals
        return JointStats({"counters": dict(new)})
