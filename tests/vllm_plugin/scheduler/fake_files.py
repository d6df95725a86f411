"""A connector that keeps texts as vLLM's example does: stored when a request starts, loaded over all of its pages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.request import Request

from tests.vllm_plugin.scheduler.fake_pages import Model, Pages

Text = tuple[int, ...]
Tables = tuple[list[int], ...]


@dataclass
class Transfers(KVConnectorMetadata):
    """Texts of a step and the pages, by group, that hold them or shall.

    Attributes:
        loads: with name and salt of who loads.
    """

    loads: list[tuple[Text, Tables, str, str | None]] = field(default_factory=list)
    stores: list[tuple[Text, Tables]] = field(default_factory=list)


class Files(KVConnectorBase_V1, SupportsHMA):
    """See the module. Both halves live in one process.

    Attributes:
        model: as the worker has it; files of other weights are not found.
        stored: what texts of full blocks stand for, by version of the model and text.
        totals: `"loaded"` counts blocks.
    """

    model: ClassVar[Model]
    stored: ClassVar[set[tuple[int, Text]]]
    totals: ClassVar[Counter[str]]

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._size = self._vllm_config.cache_config.block_size
        self._starting: dict[str, tuple[Request, Tables, int]] = {}

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._pages: Pages = next(iter(kv_caches.values()))

    # With the scheduler.

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        known = request.all_token_ids
        for count in range((request.num_tokens - 1) // self._size * self._size, num_computed_tokens, -self._size):
            if (self.model.version, tuple(known[:count])) in self.stored:
                return count - num_computed_tokens, False
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        self._starting[request.request_id] = request, blocks.get_block_ids(), num_external_tokens

    def build_connector_meta(self, scheduler_output: Any) -> Transfers:
        transfers, starting, self._starting = Transfers(), self._starting, {}
        news = {new.req_id for new in scheduler_output.scheduled_new_reqs}
        for name, (request, tables, loaded) in starting.items():
            if name not in scheduler_output.num_scheduled_tokens:
                continue  # preempted in the same step
            first = request.num_computed_tokens
            if loaded:
                text = tuple(request.all_token_ids[:first])
                transfers.loads.append((text, tables, name, request.cache_salt))
            elif name in news:
                end = min(first + scheduler_output.num_scheduled_tokens[name], request.num_prompt_tokens)
                transfers.stores.append((tuple(request.all_token_ids[: end // self._size * self._size]), tables))
        return transfers

    def request_finished_all_groups(self, request: Request, block_ids: Tables) -> tuple[bool, None]:
        return False, None

    # With the worker.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Over whatever the prefix cache had found; what the same tenant had there is as if it were not written."""
        for text, tables, name, salt in self._transfers.loads:
            by = name, salt, self.model.version
            for table, numbers in zip(tables, self._exact(text, len(tables)), strict=True):
                for slot in range(len(text) // self._size):
                    places = range(slot * self._size, (slot + 1) * self._size)
                    page, block = table[slot], tuple(numbers[places.start : places.stop])
                    if (self._pages.block(page), self._pages.salts[page]) != (block, salt):
                        for place in places:
                            self._pages.write(page, place % self._size, numbers[place], (place, text[place]), by)
            self.totals["loaded"] += len(text) // self._size

    def wait_for_save(self) -> None:
        for text, tables in self._transfers.stores:
            for table, numbers in zip(tables, self._exact(text, len(tables)), strict=True):
                assert self._pages.read(table, len(text)) == numbers, "what is stored is not what its text stands for"
            self.stored.update((self.model.version, text[:end]) for end in range(self._size, len(text) + 1, self._size))

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    @property
    def _transfers(self) -> Transfers:
        found = self._get_connector_metadata()
        assert isinstance(found, Transfers)
        return found

    def _exact(self, text: Text, groups: int) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(groups)]
        self.model.extend(found, text)
        return found


FILES = {"kv_connector": Files.__name__, "kv_connector_module_path": __name__, "kv_role": "kv_both"}
"""As an engine is asked for it."""
