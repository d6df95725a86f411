"""A worker's side of the store: pages are copied after a step and written by a thread; loads fill pages in another.

No step waits for either, and no request for a disk that hangs. A copy is taken before the scheduler can hand a page out
again; a page that is loaded belongs to a request that does not run before `finished` says so.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from vllm.logger import init_logger

from jointkv.codec.base import Aids
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.registry import decode, encode, get_codec
from jointkv.core.packed import PackedPages
from jointkv.errors import BadInput, ModelMismatch
from jointkv.store.folder import Store
from jointkv.store.records import NO_BASE, Record
from jointkv.system.background import Background, within
from jointkv.vllm_plugin.messages import Load, Save
from jointkv.vllm_plugin.worker.filler import NumberOrder
from jointkv.vllm_plugin.worker.loads import Loading, Loads

logger = init_logger(f"vllm.{__name__}")

WAITING_BYTES = 256 << 20
"""Copies that wait to be written at the most; what is offered beyond them is dropped."""

AT_A_TIME = 32
"""Pages that are encoded or decoded at once."""

UNFLUSHED_BYTES = 64 << 20
"""Written at the most before it is made sure of; less where nothing waits."""

BEHIND_WRITING, BEHIND_LOADING = 19, 10
"""Niceness of the threads. Those of a step wait for each other: beside busy ones of equal rank it takes many times as
long."""

CLOSE_S = 20.0
"""What waits when the engine ends is written for so long."""

STOP_S = 5.0
"""What is being written or read then is waited for so long, and as long for the store to close."""


def give_way(niceness: int) -> None:
    """The threads of the model go first, on Linux, where each thread has a niceness of its own and hands it down."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


@dataclass(frozen=True)
class _Copy:
    """Pages on the host as they were after a step.

    Attributes:
        held: `[layers, n, elements]`.
        ready: returns once they are there.
    """

    save: Save
    held: Tensor
    ready: Callable[[], None]


class StoredPages:
    """Writes pages to a store and fills pages from it.

    Args:
        store: to write to and read from; closed with this.
        pages: of the KV-cache group.
        order: of their elements.
        weights: a sample of the model's, which changes when they do.

    Attributes:
        off: whether an error has ended its use; what is to be loaded is lost then.
        layout: of pages in the store.
    """

    def __init__(self, store: Store, pages: PackedPages, order: NumberOrder, weights: Callable[[], bytes]) -> None:
        self.off = False
        self._weights, self._known_weights = weights, weights()
        self._store, self._pages = store, pages
        self._shapes = order.keys.shape, order.values.shape
        self._elements = order.keys.flatten().cpu(), order.values.flatten().cpu()
        (block_size, heads, key_size), value_size = order.keys.shape, order.values.shape[2]
        self.layout = Layout(len(pages.layers), block_size, heads, key_size, value_size, pages.dtype)
        self._writing = Background("jointkv-store-save", partial(give_way, BEHIND_WRITING))
        self._reading = Background("jointkv-store-load", partial(give_way, BEHIND_LOADING))
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._waiting = self._unflushed = 0
        self._jobs: list[Future[None]] = []
        self._loads = Loads(self._reading, self._load, self._count)
        self._lost: set[int] = set()

    @property
    def counts(self) -> Counter[str]:
        """Since the start, those of `metrics.STORE_COUNTERS` and `store_faults`."""
        with self._lock:
            return Counter(self._counts)

    def check_weights(self) -> None:
        """Pages of other weights are not those that the store means: its use ends where they have changed."""
        if not self.off and self._weights() != self._known_weights:
            self._end(ModelMismatch("the model has got other weights"))

    def save(self, save: Save) -> None:
        """Copy pages as they are once all that was asked of the device is done, and have them written."""
        if self.off:
            return
        try:
            size = self.layout.page_nbytes
            with self._lock:
                count = min(len(save.pages), (WAITING_BYTES - self._waiting) // size)
                self._waiting += count * size
            self._count("store_pages_dropped", len(save.pages) - count)
            if count:
                kept = Save(save.pages[:count], save.named[:count], save.positions[:count])
                self._jobs = [job for job in self._jobs if not job.done()]
                self._jobs.append(self._writing.submit(self._write, self._copy(kept)))
        except Exception as error:
            self._end(error)

    def load(self, load: Load) -> None:
        """Begin to fill the pages of a request."""
        after = None
        if self._pages.device.type == "cuda":
            after = torch.cuda.Event()
            after.record()
        self._loads.begin(Loading(load, after))

    def finished(self) -> set[str]:
        """Requests whose loads have ended since the last call, well or not, or were given up."""
        done = self._loads.finished()
        self._lost.update(page for lost in done.values() for page in lost)
        return set(done)

    def lost(self) -> set[int]:
        """Pages of them that could not be filled."""
        lost, self._lost = self._lost, set()
        return lost

    def close(self) -> None:
        """Write what waits, for a while, and close the store."""
        wait(self._jobs, CLOSE_S)
        self.off = True
        self._writing.stop(STOP_S)
        self._reading.stop(STOP_S)
        try:
            if not within(STOP_S, self._store.close):
                logger.warning("the store could not be closed: what was not written to it yet is lost")
        except Exception as error:
            self._end(error)

    def _copy(self, save: Save) -> _Copy:
        index = torch.from_numpy(save.pages).to(self._pages.device)
        apart = self._pages.device.type == "cuda"
        shape = (len(self._pages.layers), len(index), self._pages.layers[0].shape[1])
        held = torch.empty(shape, dtype=self._pages.dtype, pin_memory=apart)
        if not apart:
            for layer, copy in zip(self._pages.layers, held, strict=True):
                torch.index_select(layer, 0, index, out=copy)
            return _Copy(save, held, lambda: None)
        for layer, copy in zip(self._pages.layers, held, strict=True):
            copy.copy_(layer.index_select(0, index), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Copy(save, held, event.synchronize)

    @torch.inference_mode()
    def _write(self, copy: _Copy) -> None:
        try:
            if not self.off:
                copy.ready()
                self._put(copy)
        except Exception as error:
            self._end(error)
        finally:
            with self._lock:
                self._waiting -= len(copy.save.pages) * self.layout.page_nbytes

    def _put(self, copy: _Copy) -> None:
        save, codec = copy.save, get_codec("lossless")
        there = self._store.has([name.address for name in save.named])
        new = [number for number, known in enumerate(there) if not known]
        for start in range(0, len(new), AT_A_TIME):
            if self.off:
                return
            part = new[start : start + AT_A_TIME]
            keys, values = (
                copy.held[:, part].index_select(2, elements).view(-1, len(part), *shape)
                for elements, shape in zip(self._elements, self._shapes, strict=True)
            )
            messages = encode(codec, Pages(keys, values, torch.from_numpy(save.positions[part])), Aids())
            records = [
                Record(save.named[number].address, save.named[number].text, int(save.positions[number]), NO_BASE, said)
                for number, said in zip(part, messages, strict=True)
            ]
            written = self._store.put(records)
            nbytes = sum(record.nbytes for record in records)
            self._count("store_pages_written", written)
            self._count("store_bytes_written", nbytes)
            self._unflushed += nbytes
            if self._unflushed > UNFLUSHED_BYTES:
                self._flush()
        with self._lock:
            last = self._waiting <= len(save.pages) * self.layout.page_nbytes
        if last and self._unflushed:
            self._flush()

    def _flush(self) -> None:
        self._store.flush()
        self._unflushed = 0

    @torch.inference_mode()
    def _load(self, loading: Loading) -> None:
        try:
            if loading.after is not None:
                loading.after.synchronize()
            self._fill(loading)
        except Exception as error:
            self._end(error)

    def _fill(self, loading: Loading) -> None:
        """Fill pages from the first on, up to one that cannot be, or until the load is given up."""
        pages, wanted = loading.load.pages, loading.load.addresses[: len(loading.load.pages)]
        for start in range(0, len(wanted), AT_A_TIME):
            if self.off:
                return
            found = self._store.get(wanted[start : start + AT_A_TIME])
            records: list[Record] = []
            for record in found:
                if record is None or record.base != NO_BASE:
                    break
                records.append(record)
            # From here on the disk is not waited for, and the load not given up.
            if not self._loads.goes_on(loading, copies=True):
                return
            try:
                self._fill_part(pages[start : start + len(records)].tolist(), records)
            except BadInput:
                return
            loading.good = start + len(records)
            self._count("store_bytes_read", sum(record.nbytes for record in records))
            if len(records) < len(found) or not self._loads.goes_on(loading):
                return

    def _fill_part(self, targets: Sequence[int], records: Sequence[Record]) -> None:
        """Write what `records` hold to the pages `targets`. Raises BadInput, and changes nothing, where it is none."""
        if not targets:
            return
        positions = torch.tensor([record.position for record in records], dtype=torch.long)
        pages = decode([record.payload for record in records], self.layout, positions, Aids())
        device = self._pages.device
        blocks = torch.empty(
            len(self._pages.layers), len(targets), self._pages.layers[0].shape[1], dtype=pages.keys.dtype
        )
        for elements, side in zip(self._elements, (pages.keys, pages.values), strict=True):
            blocks.index_copy_(2, elements, side.flatten(2))
        if device.type == "cuda":
            # Beside the engine's own stream, whose steps do not wait for it.
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                self._spread(targets, blocks.pin_memory().to(device, non_blocking=True))
            stream.synchronize()
        else:
            self._spread(targets, blocks)

    def _spread(self, targets: Sequence[int], blocks: Tensor) -> None:
        index = torch.tensor(targets).to(blocks.device)
        for layer, block in zip(self._pages.layers, blocks, strict=True):
            layer.index_copy_(0, index, block)

    def _count(self, name: str, amount: int) -> None:
        with self._lock:
            self._counts[name] += amount

    def _end(self, error: Exception) -> None:
        """Use the store no more."""
        with self._lock:
            first, self.off = not self.off, True
        if first:
            self._count("store_faults", 1)
            logger.error(
                "jointkv reads and writes no stored pages until it is started again: %s: %s",
                type(error).__name__,
                error,
            )
        logger.debug("where it happened", exc_info=True)
