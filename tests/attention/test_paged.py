"""Attention over pages takes the kernel of their device, once all fits together."""

from __future__ import annotations

import warnings

import pytest
import torch

from jointkv.attention import cpu, gpu, reference
from jointkv.attention.grouping import group_pages
from jointkv.attention.layouts import LayerPages
from jointkv.attention.paged import kernel_for, paged_attention
from jointkv.errors import LayoutError
from tests.attention.paged_cases import REFUSED, SCALES, compare, expected, small_case, turn


def test_every_device_has_its_kernel(monkeypatch):
    assert kernel_for(torch.device("cuda")) is gpu.attend
    for compiled, kernel in ((print, cpu.attend), (None, reference.attend)):
        monkeypatch.setattr(cpu, "compiled", lambda compiled=compiled: compiled)
        assert kernel_for(torch.device("cpu")) is kernel


def test_pages_elsewhere_are_refused():
    batch, pages = small_case()
    elsewhere = LayerPages.of_pool(pages.keys.to("meta"), pages.values.to("meta"))
    with pytest.raises(LayoutError, match="on meta"):
        paged_attention(torch.zeros(2, 4, 16, device="meta"), elsewhere, batch.group(heads_per_kv_head=2))


def test_without_a_compiler_the_definition_does_it_and_says_so_once(fresh, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    batch, pages = small_case()
    batch.k_scale, batch.v_scale = torch.rand(2, 2, 3) + 0.5
    batch.shift = torch.tensor([[0, 3, 0], [0, 0, -2]])
    work, scales = batch.group(heads_per_kv_head=2), {"k_scale": batch.k_scale, "v_scale": batch.v_scale}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            query = torch.randn(2, 4, 16)
            found = paged_attention(query, pages, work, turn=turn, **scales)
            compare(found, expected(query, pages, batch), torch.float32)
    assert [str(warning.message).count("install gcc") for warning in said] == [1]


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(changes):
    batch, pages = small_case()
    fitting = {"query": torch.zeros(2, 4, 16), "k_scale": SCALES, "v_scale": SCALES}
    query = fitting.pop("query")
    paged_attention(query, pages, batch.group(heads_per_kv_head=2), **fitting)
    arguments = {"query": query, **fitting, **changes}
    with pytest.raises(LayoutError):
        paged_attention(arguments.pop("query"), pages, batch.group(heads_per_kv_head=2), **arguments)


def test_tables_and_pages_that_do_not_fit_are_refused():
    batch, pages = small_case()
    query = torch.zeros(2, 4, 16)
    fewer = LayerPages.of_pool(pages.keys[:4], pages.values[:4])
    with pytest.raises(LayoutError, match="5 pages"):
        paged_attention(query, fewer, batch.group(heads_per_kv_head=2))
    halves = group_pages(batch.tables, torch.tensor([20, 24]), 8, heads_per_kv_head=2)
    with pytest.raises(LayoutError, match="of 8 tokens"):
        paged_attention(query, pages, halves)
    batch.shift = torch.tensor([[0, 3, 0], [0, 0, 0]])
    with pytest.raises(LayoutError, match="rotary"):
        paged_attention(query, pages, batch.group(heads_per_kv_head=2))


def test_a_turn_that_loses_queries_is_refused():
    batch, pages = small_case()
    batch.shift = torch.tensor([[0, 3, 0], [0, 3, 0]])
    with pytest.raises(LayoutError, match="turning"):
        work = batch.group(heads_per_kv_head=2)
        paged_attention(torch.zeros(2, 4, 16), pages, work, turn=lambda query, positions: query[:1])
