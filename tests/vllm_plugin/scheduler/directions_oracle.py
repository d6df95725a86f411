"""What must hold of pages that directions are written to, and of the norms with which they are read."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.vllm_plugin.engine.others import ours
from jointkv.vllm_plugin.messages import patience


class Directions:
    """Follows the pages that are held for directions, from the pool to their readers.

    Args:
        oracle: of the engine, attached.

    Attributes:
        read: directions that members have begun to read.
    """

    def __init__(self, oracle: Any) -> None:
        self.oracle, self.read, self.merges = oracle, 0, 0
        self._since: dict[int, int] = {}
        self._patience = 1 + patience(oracle.scheduler.vllm_config.max_concurrent_batches)
        tables = oracle.side.tables
        hold, release, replace = tables.hold, tables.release, tables.replace

        def held() -> int | None:
            page: int | None = hold()
            if page is not None:
                self._since[page] = oracle.totals["steps"]
            return page

        def released(page: int) -> None:
            block = oracle.pool.blocks[page]
            readers = block.ref_cnt - 1
            assert readers != 1, "a direction has one reader, who has freed nothing"
            release(page)
            assert block.ref_cnt == readers, "a page is held for nobody"
            del self._since[page]
            self.read += readers > 1
            oracle.totals["directions"] += readers > 1

        def replaced(*entry: Any) -> None:
            replace(*entry)
            self.merges += 1

        tables.hold, tables.release, tables.replace = held, released, replaced
        oracle.pages.before_direction = self._before_writing

    def check(self) -> None:
        """No page is held for longer than it takes to write and verify it, and every merge but one frees a page."""
        oracle = self.oracle
        assert self._since.keys() == oracle.side.tables.held
        late = [page for page, step in self._since.items() if oracle.totals["steps"] > step + self._patience]
        assert not late, "a page is held and nothing is written to it"
        if oracle.settings.writes_directions:
            freed = oracle.side.statistics.totals()["pages_freed"]
            assert freed == self.merges - self.read, "pages are said to be free that are not"

    def check_norms(self) -> None:
        """The worker reads every block with the factor that was measured for the page that it reads."""
        worker, oracle = ours(get_kv_transfer_group()).worker, self.oracle
        if worker.norms is None:
            return
        for number in range(len(oracle.groups)):
            names, rows = worker.tables.batch(number)
            table = worker.norms.table(number, names, torch.from_numpy(rows))
            for row, name in enumerate(names):
                factors = oracle.accounts[name].factors
                expected = torch.ones(rows.shape[1])
                for (group, slot), factor in factors.items():
                    if group == number:
                        expected[slot] = factor
                found = torch.ones_like(expected) if table is None else table[0, 0, row]
                assert torch.equal(found, expected), f"{name} is read with other norms than its own"
        known = oracle.scheduler.requests.keys() | oracle.scheduler.finished_req_ids
        assert {name for name, _ in worker.norms._rows} <= known, "norms of a request that is gone are kept"

    def _before_writing(self, page: int, members: list[int]) -> None:
        """Nobody reads a page that is written, nobody finds it, and its members are held by who has computed them."""
        oracle = self.oracle
        block, tables = oracle.pool.blocks[page], oracle.side.tables
        held = {
            entry.block_id for group in oracle.groups for blocks in group.req_to_blocks.values() for entry in blocks
        }
        assert page in tables.held and page not in held and block.ref_cnt == 1, "a page is written that somebody reads"
        assert block.block_hash is None, "a page is written that a hash leads to"
        assert page not in oracle.side.candidates.residents, "a page is written that others find"
        assert set(members) <= held and len(set(members)) == len(members) > 1, "a direction of pages that nobody holds"
        starts = {oracle.pages.text[member][0][0] for member in members}
        step = oracle.settings.chunk_tokens if oracle.settings.scope == "chunk" else 1 << 30
        assert len({start % step for start in starts}) == 1, "a direction of blocks at several places"
