"""A store's costs: opening a large index, writing and reading pages, and fetching pages instead of computing them.

`python benchmarks/store.py --output docs/results/bench`; a few minutes on one core, and 2 GB of disk for the index.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from jointkv.codec import Bound, Pages, Transform
from jointkv.evaluate.traffic import get_traffic
from jointkv.evaluate.traffic.long_documents import LongDocuments
from jointkv.hf.identity import model_fingerprint
from jointkv.hf.models import load_model
from jointkv.hf.stored import cache_of, fit_transform, pages_of
from jointkv.store import PageStore, Record, Store, fetch, serve
from jointkv.store.index import ENTRY, Table
from jointkv.store.records import NO_BASE
from jointkv.store.segments import DATA, TABLE
from timing import write

MODEL, BLOCK, DTYPE = "smollm2", 32, torch.bfloat16
ENTRIES = 5000
"""Of one segment: 256 MB of pages of 50 kB."""

BOUND = Bound(0.2, 0.3)


def opening(folder: Path, gigabytes: float, repeats: int) -> dict[str, float]:
    """A store of so many closed segments that their indexes are so large; pages themselves are not there."""
    with Store(folder) as store:
        pass
    draw, written, tables = np.random.default_rng(0), 0, 0
    while written < gigabytes * 1e9:
        entries = np.frombuffer(draw.bytes(ENTRIES * ENTRY.itemsize), ENTRY)
        path = store.segments / f"{tables:016x}"
        Table.of(entries).write(path.with_suffix(TABLE))
        path.with_suffix(DATA).touch()
        written += path.with_suffix(TABLE).stat().st_size
        tables += 1
    unknown = [draw.bytes(32) for _ in range(125)]
    known = [bytes(entry) for entry in entries["address"][:125]]
    opened, missed, found = [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        store = Store(folder, write=False)
        opened.append(time.perf_counter() - start)
        missed.append(_seconds(lambda store=store: store.has(unknown)))
        found.append(_seconds(lambda store=store: store.has(known)))
        store.close()
    return {
        "index_gb": round(written / 1e9, 3),
        "segments": tables,
        "pages": tables * ENTRIES,
        "open_s": round(median(opened), 3),
        "open_s_per_gb": round(median(opened) / (written / 1e9), 3),
        "lookup_of_125_missing_ms": round(1e3 * median(missed), 2),
        "lookup_of_125_ms": round(1e3 * median(found), 2),
    }


def _seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def moving(folder: Path, megabytes: int = 200, size: int = 200_000) -> dict[str, float]:
    """Records of random bytes put and flushed, 16 at a time, and read again by another store."""
    draw = np.random.default_rng(0)
    count = megabytes * 1_000_000 // size
    records = [Record(draw.bytes(32), draw.bytes(16), 0, NO_BASE, draw.bytes(size)) for _ in range(count)]

    def put() -> None:
        with Store(folder) as store:
            for start in range(0, count, 16):
                store.put(records[start : start + 16])
                store.flush()

    def get() -> None:
        with Store(folder, write=False) as store:
            for start in range(0, count, 16):
                assert None not in store.get([record.address for record in records[start : start + 16]])

    return {"put_mb_per_s": round(megabytes / _seconds(put), 1), "get_mb_per_s": round(megabytes / _seconds(get), 1)}


def warm(
    model: PreTrainedModel, tokenizer: Any, folder: Path, lengths: Sequence[int], repeats: int
) -> list[dict[str, float]]:
    """Processor time to the first token of stored prompts after a restart, of fetched ones, and of computing them."""
    fit = get_traffic("unrelated").requests(tokenizer, 4, continuation_tokens=1, seed=1)
    transform = fit_transform(model, [request.prompt for request in fit], BLOCK)
    rows = []
    for length in lengths:
        novel = LongDocuments(tokens=length, kinds=("novel",))
        (request,) = novel.requests(tokenizer, 1, continuation_tokens=1, seed=0)
        rows.append(_restart(model, list(request.prompt), transform, folder, repeats))
    return rows


@torch.inference_mode()
def _restart(
    model: PreTrainedModel, tokens: list[int], transform: Transform, folder: Path, repeats: int
) -> dict[str, float]:
    clock = time.process_time  # others on the machine would be in the seconds of a clock on the wall
    computed = []
    for _ in range(repeats):
        cache = DynamicCache(config=model.config)
        start = clock()
        model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits.argmax()
        computed.append(clock() - start)
    cache.crop(-1)  # the last token of a prompt is always computed
    pages, fingerprint, place = pages_of(cache, BLOCK, DTYPE), model_fingerprint(model), folder / str(len(tokens))

    def put() -> None:
        with Store(place) as store:
            stored = PageStore(store, fingerprint, pages.layout, bound=BOUND, transform=transform)
            stored.put(tokens[: len(pages) * BLOCK], pages)

    def restart() -> None:
        with Store(place, write=False) as store:
            found = PageStore(store, fingerprint, pages.layout, bound=BOUND).load(tokens)
        assert len(found) == len(pages)
        inputs = torch.tensor([tokens[len(found) * BLOCK :]])
        model(inputs, past_key_values=cache_of(model, found), logits_to_keep=1).logits.argmax()

    put_s, restarted = _seconds(put, clock), [_seconds(restart, clock) for _ in range(repeats)]
    row = {
        "tokens": len(tokens),
        "computed_s": round(median(computed), 3),
        "stored_s": round(median(restarted), 3),
        "of_computing": round(median(restarted) / median(computed), 3),
        "put_s": round(put_s, 3),
    }
    receiver = folder / f"{len(tokens)}-fetched"
    return row | _fetched(place, receiver, fingerprint, pages, tokens, median(computed), median(restarted))


def _fetched(
    sender: Path,
    receiver: Path,
    fingerprint: str,
    pages: Pages,
    tokens: list[int],
    computed_s: float,
    stored_s: float,
) -> dict[str, float]:
    """Over loopback; and the bandwidth at which sending takes as long as computing, with what else it takes."""
    one, two = socket.socketpair()
    with Store(sender, write=False) as source, Store(receiver, secret=source.secret) as target, one:
        answering = threading.Thread(target=lambda: serve(two, source))
        answering.start()
        stored = PageStore(target, fingerprint, pages.layout, bound=BOUND)
        start = time.process_time()
        found = fetch(one, target, stored.addresses(tokens))
        fetch_s = time.process_time() - start
        one.shutdown(socket.SHUT_RDWR)
        answering.join()
    two.close()
    left = computed_s - fetch_s - stored_s  # what the bytes may take
    return {
        "fetch_s": round(fetch_s, 3),
        "bytes_per_token": round(found.received_bytes / len(tokens), 1),
        "break_even_mbit_per_s": round(8e-6 * found.received_bytes / left, 2) if left > 0 else float("nan"),
    }


def fetching(folder: Path, lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    model, tokenizer = load_model(MODEL, dtype="float32")
    rows = warm(model, tokenizer, folder, lengths, repeats)
    headline = {"break_even_mbit_per_s": rows[-1]["break_even_mbit_per_s"]}
    about = {"model": MODEL, "block_size": BLOCK, "bound": [BOUND.block, BOUND.token]}
    return {"headline": headline, "prompts": rows, **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("opening", "moving", "fetching"), action="append", help="all by default")
    parser.add_argument("--index-gb", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, action="append", help="of a stored prompt, default 4000; may be repeated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where stores are made; default: the system's temporary folder")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.part or ("opening", "moving", "fetching"):
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            if part == "opening":
                found: dict[str, Any] = opening(folder, arguments.index_gb, arguments.repeats)
            elif part == "moving":
                found = moving(folder)
            else:
                found = fetching(folder, arguments.tokens or [4000], arguments.repeats)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        write(arguments.output, f"store_{part}", {"headline": found} | found)


if __name__ == "__main__":
    main()
