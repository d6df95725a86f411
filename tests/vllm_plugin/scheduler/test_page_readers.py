"""The gauge of readers: a large pool is looked at in parts, and the sum is that of the whole."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from jointkv.vllm_plugin.engine.tables import BlockTables
from jointkv.vllm_plugin.metrics import REPORT_EVERY
from jointkv.vllm_plugin.scheduler import page_readers
from jointkv.vllm_plugin.scheduler.page_readers import PageReaders
from tests.vllm_plugin.scheduling import new_manager, new_request, start


@pytest.mark.parametrize(("pages_a_step", "steps"), [(200, 1), (101, 1), (100, 2), (30, 4)])
def test_counts_every_page_once(pages_a_step: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_readers, "PAGES_A_STEP", pages_a_step)
    manager = new_manager(pages=100)
    for name in ("a", "b"):
        start(manager, new_request({}, name))
    tables = BlockTables(manager)
    readers = PageReaders(tables)
    found = [readers.after_step() for _ in range(REPORT_EVERY + steps)]
    assert tables.shared_pages() == {1: 8} and len(tables.pool.blocks) == 101
    assert [number for number, count in enumerate(found) if count is not None] == [steps - 1, REPORT_EVERY + steps - 1]
    assert found[-1] == tables.shared_pages()
