"""Blocks of which none has found a page for long are signed at some places alone, and at all once one has."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from jointkv.vllm_plugin.scheduler.searching import EVERY, QUIET, Searching

PLACES = 40


def wanted(searching: Searching, requests: int, group: int = 0) -> list[set[int]]:
    """Of so many requests, one after the other, the places that are to be signed."""
    return [{place for place in range(PLACES) if searching.wants(group, place)} for _ in range(requests)]


def test_all_places_are_wanted_until_nothing_is_found_for_long() -> None:
    searching = Searching()
    whole, *_ = wanted(searching, QUIET // PLACES)
    assert whole == set(range(PLACES))
    wanted(searching, 1)
    assert len(wanted(searching, 1)[0]) <= -(-PLACES // EVERY)


def test_the_same_places_are_wanted_of_requests_that_could_find_each_other_and_others_later() -> None:
    searching = Searching()
    for _ in range(QUIET):
        assert searching.wants(0, 0)
    seen = set()
    for _ in range(EVERY):
        first, *others = ({place for place in range(EVERY) if searching.wants(0, place)} for _ in range(QUIET // EVERY))
        assert len(first) == 1 and all(other == first for other in others)
        seen |= first
    assert seen == set(range(EVERY)), "some place is never looked at"


def test_what_finds_a_page_wakes_its_layer_group_alone() -> None:
    searching = Searching()
    for group in (0, 1):
        wanted(searching, 20, group)
    searching.found(1)
    assert len(wanted(searching, 1, 0)[0]) < PLACES == len(wanted(searching, 1, 1)[0])
