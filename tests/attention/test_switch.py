"""The switch takes what was measured to be faster, for the sharing that a step has."""

import time

import pytest
import torch

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
def test_costs_are_measured(pages):
    """Attention that sleeps: the engine for every block, ours for every page."""

    def engine(tables, lengths, asked):
        blocks = int(lengths.sum()) // 16
        return lambda: time.sleep(2e-5 * blocks)

    def shared(work):
        time.sleep(2e-5 * len(work.pages.page))

    switch = measure(pages, 16, 1024, engine, shared, heads_per_kv_head=3)
    assert switch.engine.per_block > switch.engine.per_page
    assert switch.shared.per_page > switch.shared.per_block or pages == 2
    assert "us a page" in str(switch)
