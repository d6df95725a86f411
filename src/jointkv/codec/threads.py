"""Compressors of the pages of a batch side by side; they let go of Python's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`work` of each of `items`, in their order, on as many threads as torch may use."""
    listed, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(listed) < 2:
        return [work(item) for item in listed]
    with ThreadPoolExecutor(min(threads, len(listed))) as pool:
        return list(pool.map(work, listed))
