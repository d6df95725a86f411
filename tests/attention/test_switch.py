"""The switch takes what was measured to be faster, for the sharing that a step has."""

from types import SimpleNamespace

import pytest
import torch

from jointkv.attention import switch as switches
from jointkv.attention.grouping import group_pages
from jointkv.attention.switch import Cost, Switch, measure

LENGTHS = torch.tensor([64, 64, 64, 64])
APART = torch.arange(16).view(4, 4)
ALIKE = APART[[0, 0, 0, 0]]


def work(tables, asked=1):
    return group_pages(tables, LENGTHS, 16, query_lengths=torch.full((4,), asked))


def test_it_pays_where_enough_is_shared():
    switch = Switch(engine=Cost(0.0, 1.0), shared=Cost(1.6, 0.2), prompts=True)
    assert switch.pays(work(ALIKE)) and not switch.pays(work(APART))
    assert Switch(Cost(0.0, 1.0), Cost(0.5, 0.4), True).pays(work(APART))


def test_prompts_are_left_to_the_engine_where_it_reads_them_faster():
    for prompts in (True, False):
        switch = Switch(Cost(0.0, 1.0), Cost(0.1, 0.1), prompts)
        assert switch.pays(work(ALIKE, asked=8)) is prompts and switch.pays(work(ALIKE))


@pytest.mark.parametrize("pages", [2, 400])
def test_costs_are_measured(pages, monkeypatch):
    """Attention that takes 20 us, the engine's for every block, ours for every page."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(switches, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def take(number):
        clock.now += 2e-5 * number

    def engine(tables, lengths, asked):
        blocks = int(lengths.sum()) // 16
        return lambda: take(blocks)

    def shared(work):
        take(len(work.pages.page))

    switch = measure(pages, 16, 1024, engine, shared, heads_per_kv_head=3)
    assert switch.engine == pytest.approx((0.0, 2e-5))
    assert pages == 2 or switch.shared == pytest.approx((2e-5, 0.0), abs=1e-6)  # last pages by every row
    assert "us a page" in str(switch)
