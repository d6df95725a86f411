"""What the plugin asks of a model runner."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jointkv.system.interfaces import Use


class Remap(NamedTuple):
    """From now on `request_id` reads `page` at `slot` of its table of `group`.

    Attributes:
        own: the page it read there until now.
        step: whose verdict this follows from. Workers that keep norms find by it, `own` and `page` what they measured.
    """

    request_id: str
    group: int
    slot: int
    page: int
    own: int
    step: int


class WorkerTables(ABC):
    """The block tables of a worker's model runner.

    Args:
        runner: vLLM's.

    Attributes:
        USES: of vLLM, beside what every runner needs.
    """

    USES: ClassVar[tuple[Use, ...]]

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    @abstractmethod
    def between_steps(self) -> AbstractContextManager[Any]:
        """Inside, nothing of the last step reads the tables any more and nothing of the next one does yet."""

    @abstractmethod
    def block_size(self, group: int) -> int:
        """Tokens per entry, as the attention kernel of KV-cache group `group` counts them."""

    @abstractmethod
    def replace(self, remaps: Sequence[Remap]) -> None:
        """Replace entries; a request that has left the runner is passed over: its table is gone with it."""

    @abstractmethod
    def read(self, request_id: str, group: int, slots: int) -> list[list[int]]:
        """The first `slots` pages of a scheduled request, as everything that keeps its table has them."""

    @abstractmethod
    def begin(self, output: Any) -> None:
        """Take note of the step that the scheduler's `output` describes, before it is prepared, for `batch`."""

    @abstractmethod
    def batch(self, group: int) -> tuple[list[str], np.ndarray]:
        """The requests of the step's rows and their tables, integers `[rows, slots]`, on the host; not copied."""
