"""One licence per class of pages: what is counted, logged and shown of them, and nothing of their keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from jointkv.policy.profile import ReuseEvidence
from jointkv.policy.reuse import ReuseRule
from jointkv.theory.confidence import UpperLimit
from jointkv.theory.licence import FirstLicences, Licence
from jointkv.vllm_plugin.metrics import LICENCE_STATES, Statistics
from jointkv.vllm_plugin.scheduler import licences as room
from jointkv.vllm_plugin.scheduler.licences import SHOWN_KEYS, Licences, PageClass, audits_of_profile, first_licences
from jointkv.vllm_plugin.settings import PluginSettings
from tests.core.profiles import make_profile

LOOSE = 0.3
ENOUGH = 30
"""Clean audits after which a licence of `LOOSE` is granted."""


@pytest.fixture
def statistics() -> Statistics:
    return Statistics()


@pytest.fixture
def licences(statistics: Statistics) -> Licences:
    return Licences(FirstLicences({}, LOOSE, 0.95), statistics)


def audit(licences: Licences, page_class: PageClass, missed: int = 0, times: int = ENOUGH) -> None:
    for _ in range(times):
        licences.observe(page_class, missed, 4)


def test_a_class_earns_for_itself_alone(licences: Licences, statistics: Statistics) -> None:
    mine, other = PageClass("mine", True), PageClass("other", True)
    audit(licences, mine)
    assert licences.granted(mine) and not licences.granted(other) and not licences.granted(PageClass("mine", False))
    counted = statistics.totals()
    assert (counted["reuse_audits"], counted["reuse_audited_blocks"]) == (ENOUGH, 4 * ENOUGH)
    assert (counted["licences_granted"], counted["licences_lost"], counted["reuse_missed_blocks"]) == (1, 0, 0)
    audit(licences, mine, missed=4)
    assert not licences.granted(mine) and statistics.totals()["licences_lost"] == 1
    licences.check_integrity()


def test_gauges(licences: Licences) -> None:
    audit(licences, PageClass("first", True))
    audit(licences, PageClass("second", False), missed=1, times=1)
    shown = licences.gauges(LOOSE)
    assert shown["allowed"] == LOOSE and shown["states"] == {"granted": 1, "earning": 1}
    assert list(shown["classes"]) == ["exact 1", "approximate 2"]
    state, limit = shown["classes"]["exact 1"]
    assert state == "granted" and 0 < limit <= LOOSE
    assert {state for state, _ in shown["classes"].values()} <= set(LICENCE_STATES)


def test_it_says_when_there_is_something_new(licences: Licences) -> None:
    assert licences.news(LOOSE) == licences.gauges(LOOSE)
    for changes in (True, False):
        licences.granted(PageClass("first", True))
        assert (licences.news(LOOSE) is not None) is changes
    audit(licences, PageClass("first", True), times=1)
    assert licences.news(LOOSE) == licences.gauges(LOOSE)


def test_the_first_keys_are_shown_and_all_are_counted(licences: Licences) -> None:
    for key in range(SHOWN_KEYS + 3):
        licences.granted(PageClass(key, True))
    shown = licences.gauges(LOOSE)
    assert list(shown["classes"]) == [f"exact {number}" for number in range(1, SHOWN_KEYS + 1)]
    assert shown["states"] == {"earning": SHOWN_KEYS + 3}


def test_a_number_is_free_when_nothing_of_its_key_is_kept(
    statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MOST_CLASSES", 3)
    licences = Licences(FirstLicences({}, LOOSE, 0.95), statistics)
    for page_class in (
        PageClass("old", True),
        PageClass("old", False),
        PageClass("new", True),
        PageClass("newer", True),
    ):
        licences.granted(page_class)
    assert list(licences.gauges(LOOSE)["classes"]) == ["approximate 1", "exact 2", "exact 3"]
    licences.granted(PageClass("newest", True))
    licences.granted(PageClass("after all", True))
    assert list(licences.gauges(LOOSE)["classes"]) == ["exact 3", "exact 1", "exact 2"]


def test_nothing_is_said_of_a_key(licences: Licences, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(room.logger, "info", lambda text, *words: said.append(text % words))
    audit(licences, PageClass("a secret salt", True))
    assert len(said) == 1 and "exact 1" in said[0] and "granted" in said[0]
    assert "secret" not in f"{said}{licences.gauges(LOOSE)}"


def settings_of(tmp_path: Path, found: ReuseEvidence | None, **options: Any) -> PluginSettings:
    make_profile(reuse=found).save(tmp_path / "profile.json")
    return PluginSettings.parse({"profile": str(tmp_path / "profile.json"), "reuse": "licensed", **options})


def first_by(settings: PluginSettings) -> Callable[[PageClass], Licence]:
    first = first_licences(settings, audits_of_profile(settings))
    return lambda page_class: first.new(page_class.words)


def audits(count: int) -> ReuseEvidence:
    """Without a miss."""
    limit = UpperLimit(0.95)
    for _ in range(count):
        limit.observe(0.0)
    found = {"audits": count, "blocks": 4 * count, "missed_blocks": 0, "skipped": 0.5, "limit": limit.limit}
    return ReuseEvidence(**found, evidence=limit.to_json())


EXACT, APPROXIMATE = PageClass("key", True), PageClass("key", False)
MOVED = PageClass("key", False, moved=True)


def test_audits_of_the_profile_grant_the_first_licence_of_exact_pages(tmp_path: Path) -> None:
    first = first_by(settings_of(tmp_path, audits(172)))
    assert first(EXACT).granted and not first(APPROXIMATE).granted
    assert not first_by(settings_of(tmp_path, audits(172), reuse_miss_rate=0.01))(EXACT).granted
    foreign = first(EXACT)
    assert [foreign.observe(0.5) for _ in range(20)].count("lost") == 1 and not foreign.granted


def test_what_the_audits_of_many_keys_refute_is_granted_to_no_further_one(tmp_path: Path) -> None:
    """Each has one audit, and would keep to its end what a profile of other traffic has granted."""
    settings = settings_of(tmp_path, audits(172))
    licences = Licences(first_licences(settings, audits_of_profile(settings)), Statistics())

    def served(keys: range, missed: int) -> int:
        granted = 0
        for key in keys:
            granted += licences.granted(PageClass(key, True))
            licences.observe(PageClass(key, True), missed, 20)
        return granted

    assert served(range(50), 0) == 50 and 1 <= served(range(50, 100), 2) < 10
    assert licences.granted(PageClass(0, True)), "its own audits have not spoken against it"
    assert served(range(100, 150), 2) == 0 and 0 < served(range(150, 1000), 0) < 850
    licences.check_integrity()


def test_audits_at_other_positions_grant_the_first_licence_of_moved_text_alone(tmp_path: Path) -> None:
    both = audits(30).model_copy(update={"moved": audits(172)})
    first = first_by(settings_of(tmp_path, both, moved=True))
    assert first(MOVED).granted and not first(EXACT).granted and not first(APPROXIMATE).granted
    assert not first_by(settings_of(tmp_path, audits(172), moved=True))(MOVED).granted


@pytest.mark.parametrize(
    ("options", "counts"),
    [({}, True), ({"reuse": "probed"}, True), ({"reuse": "off"}, False), ({"max_relative_error": 0.1}, False)],
    ids=["licensed", "probed", "off", "other bounds"],
)
def test_reuse_goes_by_the_rule_of_the_audits(tmp_path: Path, options: dict[str, Any], counts: bool) -> None:
    said = audits(30).model_copy(update={"near": 0.75, "echoes": False})
    found = audits_of_profile(settings_of(tmp_path, said, **options))
    assert (None if found is None else found.rule) == (ReuseRule(near=0.75, echoes=False) if counts else None)


@pytest.mark.parametrize(
    ("reuse", "options", "said"),
    [
        (None, {}, "no audits of reuse"),
        (audits(172), {"max_relative_error": 0.1}, "of other bounds"),
        (audits(172), {"max_token_error": 0.9}, "of other bounds"),
        (audits(30), {}, "licence not earned yet"),
    ],
    ids=["none", "bound", "token bound", "too few"],
)
def test_a_profile_that_grants_nothing_says_why(
    tmp_path: Path, reuse: ReuseEvidence | None, options: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", room.logger.name)
    room.logger.addHandler(caplog.handler)
    try:
        assert not first_by(settings_of(tmp_path, reuse, **options))(EXACT).granted
    finally:
        room.logger.removeHandler(caplog.handler)
    assert said in caplog.text
