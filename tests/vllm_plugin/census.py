"""Watches every step of an engine, independently of the plugin: who reads which page, and who may."""

from __future__ import annotations

from collections import Counter
from typing import Any

from engines import Engine

Party = tuple[str | None, bool]
"""Salt of a request, and whether it opted out."""


class Census:
    """Attach to an engine before the first request.

    Attributes:
        merges, generated: table entries replaced, and those of them past the prompt.
        checks: steps whose worker tables were compared with the scheduler's.
    """

    def __init__(self, engine: Engine, patch: Any) -> None:
        self.engine = engine
        self.merges = self.generated = self.checks = 0
        self._written_by: dict[int, Party] = {}
        tables = engine.fusion.tables
        replace, execute = tables.replace, engine.runner.execute_model

        def watched(request_id: str, group: int, slot: int, page: int) -> None:
            self._before_replacing(request_id, slot, page)
            replace(request_id, group, slot, page)

        def compared(scheduler_output: Any, *more: Any, **options: Any) -> Any:
            result = execute(scheduler_output, *more, **options)
            self._compare_worker(scheduler_output)
            return result

        patch.setattr(tables, "replace", watched)
        patch.setattr(engine.runner, "execute_model", compared)
        engine.watchers.append(self.after_step)

    def after_step(self, engine: Engine) -> None:
        """Reference counts are numbers of entries; readers of one page have one salt, the one the index knows."""
        entries: Counter[int] = Counter()
        readers: dict[int, set[str | None]] = {}
        for request_id, pages in self._tables().items():
            party = self._party(request_id)
            entries.update(pages)
            for slot, page in enumerate(pages):
                for isolation, _, place, _ in engine.fusion.index._buckets.get(page, ()):
                    assert (isolation[0], place) == (party[0], slot), "the index holds a page that was handed out again"
                readers.setdefault(page, set()).add(party[0])
                self._written_by[page] = party
        assert all(len(salts) == 1 for salts in readers.values())
        for block in engine.pool.blocks:
            assert block.is_null or block.ref_cnt == entries[block.block_id]
        assert engine.pages_in_use == len(entries)
        engine.fusion.check_integrity()

    def _tables(self) -> dict[str, list[int]]:
        (group,) = self.engine.vllm_scheduler.kv_cache_manager.coordinator.single_type_managers
        return {name: [block.block_id for block in blocks] for name, blocks in group.req_to_blocks.items()}

    def _party(self, request_id: str) -> Party:
        request = self.engine.vllm_scheduler.requests[request_id]
        return request.cache_salt, (request.sampling_params.extra_args or {}).get("jointkv") is False

    def _before_replacing(self, request_id: str, slot: int, page: int) -> None:
        request = self.engine.vllm_scheduler.requests[request_id]
        held = [name for name, pages in self._tables().items() if page in pages]
        for party in [self._party(name) for name in held] or [self._written_by[page]]:
            assert party == (request.cache_salt, False)
        self.merges += 1
        size = self.engine.vllm_scheduler.block_size
        self.generated += (slot + 1) * size > request.num_prompt_tokens

    def _compare_worker(self, scheduler_output: Any) -> None:
        """The tables with which a step was computed are the scheduler's."""
        tables, batch = self._tables(), self.engine.runner.input_batch
        for request_id in scheduler_output.num_scheduled_tokens:
            pages = tables[request_id]
            row = batch.block_table[0].block_table.np[batch.req_id_to_index[request_id], : len(pages)]
            assert row.tolist() == pages == self.engine.runner.requests[request_id].block_ids[0]
        self.checks += bool(scheduler_output.num_scheduled_tokens)
