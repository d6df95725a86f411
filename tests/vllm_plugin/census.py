"""Watches every step of an engine, independently of the plugin: who reads which page, and who may."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.fusion.signature import token_hashes
from jointkv.fusion.token_index import places
from jointkv.vllm_plugin.engine.pages import NULL_PAGE
from tests.vllm_plugin.engines import Engine

Party = tuple[str | None, str | None, bool]
"""Salt and adapter of a request, and whether it opted out."""


class Census:
    """Attach to an engine before the first request.

    Attributes:
        merges, generated: table entries replaced, or to be found instead, and those of them past the prompt.
        met: per merge the request that reads a page from then on and the one that has written it.
        checks: steps whose worker tables were compared with the scheduler's.
        in_place: blocks that requests were seen to read where their text stands, step by step.
    """

    def __init__(self, engine: Engine, patch: Any) -> None:
        self.engine = engine
        self.merges = self.generated = self.checks = self.in_place = 0
        self.met: list[tuple[str, str]] = []
        self._written_by: dict[int, Party] = {}
        self._writer: dict[int, str] = {}
        self._text: dict[int, tuple[list[int], int]] = {}
        """Tokens of full pages, and the position of the first."""
        tables = engine.side.tables
        replace, execute, hand_out = tables.replace, engine.runner.execute_model, engine.pool.get_new_blocks
        adopt, fill = engine.side.sharing.adopt, engine.side.candidates.residents.add_filled

        def watched(request_id: str, group: int, slot: int, page: int) -> None:
            self._before_replacing(request_id, slot, page)
            replace(request_id, group, slot, page)

        def adopted(tracked: Any, group: int, first: int, pages: Sequence[int]) -> None:
            for page in pages:
                if page != NULL_PAGE:
                    self._before_replacing(tracked.request.request_id, first, page)
            adopt(tracked, group, first, pages)

        def filled(tracked: Any, text: Any, slots: Any, numbers: Any, pages: Any) -> None:
            self._before_filling(tracked.request.request_id, text.fills_of(numbers), pages.tolist())
            for slot, page in zip(slots.tolist(), pages.tolist(), strict=True):
                self._text[page] = self._block(tracked.request.request_id, slot)
            fill(tracked, text, slots, numbers, pages)

        def compared(scheduler_output: Any, *more: Any, **options: Any) -> Any:
            result = execute(scheduler_output, *more, **options)
            self._compare_worker(scheduler_output)
            return result

        def handed_out(*more: Any, **options: Any) -> Any:
            blocks = hand_out(*more, **options)
            for block in blocks:
                self._writer.pop(block.block_id, None)
                self._text.pop(block.block_id, None)
            return blocks

        directions = engine.side.fusion.directions
        take = directions.take

        def taken(step: int) -> Any:
            writes = take(step)
            for write in writes:
                self._before_writing(write.page, write.members)
            return writes

        patch.setattr(directions, "take", taken)
        patch.setattr(tables, "replace", watched)
        patch.setattr(engine.side.sharing, "adopt", adopted)
        patch.setattr(engine.side.candidates.residents, "add_filled", filled)
        patch.setattr(engine.runner, "execute_model", compared)
        patch.setattr(engine.pool, "get_new_blocks", handed_out)
        engine.watchers.append(self.after_step)

    def between(self, *names: str) -> int:
        """Merges so far between different ones of the requests `names`."""
        ours = [[name for name in names for one in pair if one.startswith(f"{name}-")] for pair in self.met]
        return sum(len(set(pair)) == 2 for pair in ours)

    def after_step(self, engine: Engine) -> None:
        """Reference counts are numbers of entries; readers of one page have one salt, the one the index knows."""
        entries: Counter[int] = Counter()
        readers: dict[int, set[Party]] = {}
        for request_id, groups in self._tables().items():
            party = self._party(request_id)
            for pages in groups:
                entries.update(page for page in pages if page != NULL_PAGE)
                for slot, page in enumerate(pages):
                    if page == NULL_PAGE:
                        continue
                    for (isolation, _), place in engine.side.candidates.residents.index._buckets.get(page, ()):
                        if len(isolation) == 3:  # that of a chunk names its request
                            moved = place != self._place(request_id, slot) and engine.side.settings.scope == "batch"
                            known = isolation[0] == party[0] and not moved
                            assert known, "the index holds a page that was handed out again"
                    readers.setdefault(page, set()).add((*party[:2], False))
                    self._written_by[page] = party
                    self._writer.setdefault(page, request_id)
        for page, party in self._read_in_place():
            readers.setdefault(page, {(*self._written_by[page][:2], False)}).add(party)
            assert engine.pool.blocks[page].ref_cnt, "a page is read in place and may be handed out"
        assert all(len(parties) == 1 for parties in readers.values())
        held = engine.side.tables.held
        assert not entries.keys() & held, "a page is read before what is written to it is verified"
        entries.update(held)
        entries.update(engine.side.tables.lent)
        for block in engine.pool.blocks:
            assert block.is_null or block.ref_cnt == entries[block.block_id]
        assert engine.pages_in_use == len(entries)
        engine.side.check_integrity()

    def _read_in_place(self) -> Iterator[tuple[int, Party]]:
        """Pages that are read in place, and by whom: for the same tokens, with the right shift."""
        reads = get_kv_transfer_group().worker.in_place
        for request_id, groups in self._tables().items():
            slots = [slot for slot, page in enumerate(groups[0]) if page == NULL_PAGE]
            if not slots:
                continue
            fills = reads._of[request_id]
            assert fills.slots.tolist() == slots
            self.in_place += len(slots)
            for slot, first, second, offset, shift in zip(
                *(part.tolist() for part in (fills.slots, fills.first, fills.second, fills.offset, fills.shift)),
                strict=True,
            ):
                beginning, position = self._text[first]
                rest, after = self._text[second] if offset else ([], position + self._size)
                tokens, place = self._block(request_id, slot)
                assert tokens == beginning[offset:] + rest[:offset] and after == position + self._size
                assert shift == place - position - offset
                for page in {first, second}:
                    yield page, (*self._party(request_id)[:2], False)

    @property
    def _size(self) -> int:
        return int(self.engine.vllm_scheduler.block_size)

    def _block(self, request_id: str, slot: int) -> tuple[list[int], int]:
        tokens = self.engine.vllm_scheduler.requests[request_id].all_token_ids
        return list(tokens[slot * self._size : (slot + 1) * self._size]), slot * self._size

    def _tables(self) -> dict[str, list[list[int]]]:
        """Per request the pages of its table in every group."""
        managers = self.engine.vllm_scheduler.kv_cache_manager.coordinator.single_type_managers
        names = managers[0].req_to_blocks
        return {name: [[block.block_id for block in one.req_to_blocks[name]] for one in managers] for name in names}

    def _place(self, request_id: str, slot: int) -> int:
        """Where a page with this block belongs in the index."""
        size, tokens = self.engine.vllm_scheduler.block_size, self.engine.vllm_scheduler.requests[request_id]
        block = torch.tensor(tokens.all_token_ids[slot * size : (slot + 1) * size])
        return places(token_hashes(block, size).numpy(), np.array([slot]))[0] if len(block) == size else 0

    def _party(self, request_id: str) -> Party:
        request = self.engine.vllm_scheduler.requests[request_id]
        adapter = request.lora_request and request.lora_request.lora_name
        opted_out = (request.sampling_params.extra_args or {}).get("jointkv") is False
        return request.cache_salt, adapter, opted_out and request_id not in self.engine.side.helpers

    def _before_replacing(self, request_id: str, slot: int, page: int) -> None:
        request = self.engine.vllm_scheduler.requests[request_id]
        held = [name for name, groups in self._tables().items() if any(page in pages for pages in groups)]
        parties = [self._party(name) for name in held] or [self._written_by[page]]
        assert {party[:2] for party in parties} == {self._party(request_id)[:2]}
        # One that opted out may have found the page of another in vLLM's own prefix cache.
        assert not self._party(request_id)[2] and not all(opted_out for *_, opted_out in parties)
        self.merges += 1
        self.met.append((request_id, self._writer.get(page, held[0] if held else "unknown")))
        size = self.engine.vllm_scheduler.block_size
        self.generated += (slot + 1) * size > request.num_prompt_tokens

    def _before_writing(self, page: int, members: Sequence[int]) -> None:
        """A direction is that of blocks of one party, who hold them."""
        tables = self._tables()
        held = [name for name, groups in tables.items() if any({*members} & {*pages} for pages in groups)]
        (party,) = {self._party(name) for name in held}
        assert not party[2] and not any(page in pages for groups in tables.values() for pages in groups)
        self._written_by[page], self._writer[page] = party, held[0]

    def _before_filling(self, request_id: str, fills: Any, pages: list[int]) -> None:
        """Pages are written from text of one party, for one of that party."""
        sources = {*fills.first.tolist(), *fills.second.tolist()}
        assert {self._written_by[page][:2] for page in sources} == {self._party(request_id)[:2]}
        assert not self._party(request_id)[2] and not sources & set(pages)
        for page in pages:
            self._written_by[page] = self._party(request_id)
            self._writer[page] = request_id

    def _compare_worker(self, scheduler_output: Any) -> None:
        """The tables with which a step was computed are the scheduler's."""
        tables, worker = self._tables(), get_kv_transfer_group().worker.tables
        for request_id in scheduler_output.num_scheduled_tokens:
            for group, pages in enumerate(tables[request_id]):
                assert all(known == pages for known in worker.read(request_id, group, len(pages)))
                # Who ends in this step is in no table after it.
                own = {page: slot for slot, page in enumerate(pages) if page != NULL_PAGE}
                self._written_by.update(dict.fromkeys(own, self._party(request_id)))
                full = self.engine.vllm_scheduler.requests[request_id].num_computed_tokens // self._size
                for page, slot in own.items():
                    if slot < full:
                        self._text.setdefault(page, self._block(request_id, slot))
        self.checks += bool(scheduler_output.num_scheduled_tokens)
