"""A store on disk behind an engine: the next one loads what this one has computed, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer import get_kv_transfer_group

from jointkv.codec.base import Aids
from jointkv.codec.registry import decode
from jointkv.errors import StoreError
from jointkv.store import Record, Store, known
from jointkv.store.records import scan
from jointkv.store.segments import DATA
from jointkv.vllm_plugin.scheduler import stored as look_ups
from jointkv.vllm_plugin.worker import loads, stored
from tests.hazards import FIRST, FIRST_AHEAD, runs
from tests.store.hanging import HangingDisk
from tests.vllm_plugin.engines import EXACT, LOSSY, Engine, Prompt, engine, near_prefix, text

BLOCK, OUT = 32, 8
LONG = text(300, 1)
PROMPTS = [LONG, LONG[:200] + text(60, 2), text(90, 3)]
WHOLE = [288, 256, 64]
"""Tokens of whole blocks before the last token of each."""
LOADED = sum(WHOLE) - 192
"""Together: of the second, what the first one loads is found in the prefix cache."""

OPTIONS: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 256}
TIGHT = {**OPTIONS, "max_model_len": 256}
CROWD = [text(90 + number, number // 2) for number in range(12)]

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
pytestmark = [pytest.mark.usefixtures("patient_store"), *runs("stored pages", FIRST)]


@pytest.fixture(scope="module")
def stock(calm: Path) -> list[list[Prompt]]:
    with engine(calm, **OPTIONS) as served:
        return [served.generate(PROMPTS, OUT), served.generate(CROWD, OUT)]


@pytest.fixture(scope="module")
def written(calm: Path, stock: list[list[Prompt]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a first engine has left."""
    folder = tmp_path_factory.mktemp("first") / "pages"
    with engine(calm, 60, {**EXACT, "store": str(folder)}, **OPTIONS) as served:
        assert served.generate(PROMPTS, OUT) == stock[0]
        assert served.statistics["store_misses"] == 3 and served.statistics["store_hits"] == 0
        served.assert_drained()
        worker = counts(served)
    assert worker["store_pages_dropped"] == worker["store_faults"] == 0
    return folder


@pytest.fixture
def found(written: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own."""
    return shutil.copytree(written, tmp_path / "pages")


def counts(served: Engine) -> Counter[str]:
    """Of the worker."""
    return get_kv_transfer_group().worker.stored.counts


def records(folder: Path) -> dict[bytes, Record]:
    with Store(folder, write=False) as store:
        read = [
            part.record for file in store.segments.glob(f"*{DATA}") for part in scan(file.read_bytes(), store.secret)
        ]
    return {record.address: record for record in read if record is not None}


@pytest.mark.parametrize(
    "ahead",
    [False, pytest.param(True, marks=[pytest.mark.slow, *runs("stored pages", FIRST_AHEAD)])],
    ids=["in step", "a step ahead"],
)
def test_the_next_engine_loads_what_the_first_has_computed(
    ahead: bool, calm: Path, stock: list[list[Prompt]], found: Path
) -> None:
    with engine(calm, 60, {**EXACT, "store": str(found)}, async_scheduling=ahead, **OPTIONS) as served:
        salted = served.generate(PROMPTS, OUT, salt="another tenant")
        assert salted == stock[0] and served.statistics["store_hits"] == 0
        assert served.generate(PROMPTS, OUT) == stock[0]
        assert served.statistics["store_hits"] == 3 and served.statistics["faults"] == 0
        assert served.statistics["store_tokens_loaded"] == LOADED
        assert counts(served)["store_pages_read"] == LOADED // BLOCK and counts(served)["store_pages_lost"] == 0
        known = served.statistics["store_misses"]
        assert served.generate(PROMPTS[:1], OUT) == stock[0][:1], "from the prefix cache"
        assert served.statistics["store_misses"] == known + 1 and served.statistics["store_hits"] == 3
        served.assert_drained()


SECOND = """
import json, os, sys
from pathlib import Path
from tests.vllm_plugin.conftest import ENVIRONMENT
os.environ.update(ENVIRONMENT)
from tests.vllm_plugin.test_stored import EXACT, OPTIONS, OUT, PROMPTS, engine, look_ups
look_ups.LOOK_UP_S = 100.0
with engine(Path(sys.argv[1]), 60, {**EXACT, "store": sys.argv[2]}, **OPTIONS) as served:
    found = {"answers": served.generate(PROMPTS, OUT), "loaded": served.statistics["store_tokens_loaded"]}
print("FOUND " + json.dumps(found))
"""


@SLOW
def test_a_second_engine_answers_from_what_a_running_one_has_computed(
    calm: Path, stock: list[list[Prompt]], tmp_path: Path
) -> None:
    folder = str(tmp_path / "pages")
    with engine(calm, 60, {**EXACT, "store": folder}, **OPTIONS) as served:
        served.generate(PROMPTS, OUT)
        get_kv_transfer_group().worker.stored._writing.submit(int).result()
        command = [sys.executable, "-c", SECOND, str(calm), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stderr[-3000:]]
        assert json.loads(line.removeprefix("FOUND ")) == {"answers": stock[0], "loaded": LOADED}
        assert served.generate(PROMPTS, OUT) == stock[0] and counts(served)["store_faults"] == 0
        served.assert_drained()


@SLOW
def test_it_goes_without_fusion_and_holds_answers_too(calm: Path, stock: list[list[Prompt]], found: Path) -> None:
    longer = LONG + stock[0][0] + text(30, 9)
    with engine(calm, 60, {"enabled": False, "store": str(found)}, **OPTIONS) as served:
        (first,) = served.generate([longer], 40)
        assert served.statistics["store_tokens_loaded"] == 288 and served.statistics["state"] == "off"
        served.assert_drained()
    with engine(calm, 60, {"enabled": False, "store": str(found)}, **OPTIONS) as served:
        served.generate([longer + first], OUT)
        assert served.statistics["store_tokens_loaded"] == 352, (
            "of 378 tokens one was not computed, and 26 fill no block"
        )
        served.assert_drained()


@pytest.mark.hazard(
    "Stored pages",
    "bits are flipped in a store, or segments are cut or lost",
    "what is damaged is computed: answers are stock's",
)
@pytest.mark.parametrize("damage", ["bits", *(pytest.param(kind, marks=SLOW) for kind in ("cut", "lost"))])
def test_what_is_damaged_is_computed(damage: str, calm: Path, stock: list[list[Prompt]], found: Path) -> None:
    (segment,) = (found / "segments").glob(f"*{DATA}")
    data = bytearray(segment.read_bytes())
    for place in range(len(data) // 3, len(data), len(data) // 7):
        data[place] ^= 1
    if damage == "lost":
        segment.unlink()
    else:
        segment.write_bytes(data if damage == "bits" else data[: len(data) // 2])
    with engine(calm, 60, {**EXACT, "store": str(found)}, **OPTIONS) as served:
        assert served.generate(PROMPTS, OUT) == stock[0]
        worker = counts(served)
        assert worker["store_faults"] == served.statistics["store_faults"] == served.statistics["faults"] == 0
        assert (worker["store_pages_lost"] > 0) == (damage != "lost")
        assert (
            worker["store_pages_read"] + worker["store_pages_lost"] == served.statistics["store_tokens_loaded"] // BLOCK
        )
        assert served.generate(PROMPTS, OUT) == stock[0]
        served.assert_drained()


@pytest.mark.hazard(
    "Stored pages",
    "blocks that are read from another's page, and what is computed behind them",
    "never in a store, which has what the model computes",
)
def test_what_approximates_is_never_stored(calm: Path, found: Path, tmp_path: Path) -> None:
    near, read = near_prefix(4, shared=200, tail=60), []
    for fusion in (EXACT, {**LOSSY, "max_relative_error": 0.5}):
        folder = shutil.copytree(found, tmp_path / str(len(read)))
        with engine(calm, 60, {**fusion, "store": str(folder)}, **OPTIONS) as served:
            served.generate(near, 24)
            merged = served.statistics["blocks_merged"]
            layout = get_kv_transfer_group().worker.stored.layout
        read.append(records(folder))
    exact, fused = read
    assert merged > 4 and fused.keys() < exact.keys() and len(fused) > len(records(found))
    position = torch.zeros(1, dtype=torch.long)
    for address, record in fused.items():
        pages = [decode([one.payload], layout, position, Aids()) for one in (exact[address], record)]
        assert torch.allclose(pages[0].keys, pages[1].keys, atol=1e-4)
        assert torch.allclose(pages[0].values, pages[1].values, atol=1e-4)


@pytest.mark.hazard(
    "Stored pages",
    "requests are preempted and aborted while pages are loaded and stored, in a full pool",
    "answers at bound 0 are stock's, tables are equal in every step, all pages come back",
)
@pytest.mark.parametrize(
    "ahead",
    [False, pytest.param(True, marks=[pytest.mark.slow, *runs("stored pages", FIRST_AHEAD)])],
    ids=["in step", "a step ahead"],
)
def test_a_crowd_in_a_full_pool(ahead: bool, calm: Path, stock: list[list[Prompt]], tmp_path: Path) -> None:
    for attempt in range(2):
        fusion = {**EXACT, "reuse": "auto", "store": str(tmp_path / "pages")}
        with engine(calm, 14, fusion, async_scheduling=ahead, **TIGHT) as served:
            names = [served.submit(prompt, OUT) for prompt in CROWD]
            for step in range(12):
                served.step()
                if step in (1, 6):
                    served.abort(names[step])
            served.finish()
            for number, name in enumerate(names):
                assert number in (1, 6) or served.outputs[name] == stock[1][number]
            assert served.statistics["faults"] == served.statistics["store_faults"] == 0
            assert (served.statistics["store_hits"] > 0) == (attempt > 0)
            served.assert_drained()


@pytest.fixture
def served(calm: Path, found: Path) -> Iterator[Engine]:
    with engine(calm, 60, {**EXACT, "store": str(found)}, **OPTIONS) as served:
        yield served


@pytest.mark.hazard(
    "Stored pages",
    "a request is aborted while its pages are loaded",
    "nobody gets its pages before the load has ended",
)
def test_an_aborted_request_keeps_its_pages_until_the_load_has_ended(
    served: Engine, stock: list[list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, goes_on = get_kv_transfer_group().worker.stored, threading.Event()
    fill, held = worker._fill, []

    def slow(loading: Any) -> None:
        held.append(loading.load.pages.tolist())
        assert goes_on.wait(60)
        fill(loading)

    monkeypatch.setattr(worker, "_fill", slow)
    name = served.submit(LONG, OUT)
    while not held:
        served.step()
    served.abort(name)
    other = served.submit(PROMPTS[2] + [7], OUT, salt="of a tenant without pages")
    # The store is asked for it first.
    while not any(one.request_id.startswith(other) for one in served.vllm_scheduler.running):
        served.step()
    assert not set(held[0]).intersection(served.table(other)) and served.pages_in_use >= len(held[0])
    goes_on.set()
    served.finish()
    while served.pages_in_use:
        served.step()
    monkeypatch.setattr(worker, "_fill", fill)
    assert served.generate(PROMPTS, OUT) == stock[0]
    served.assert_drained()


@pytest.mark.hazard(
    "Stored pages",
    "the disk hangs while pages are loaded",
    "what was to be loaded is computed, and nothing is written to its pages when the disk answers again",
)
def test_requests_do_not_wait_for_a_disk_that_hangs(
    served: Engine, stock: list[list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = HangingDisk()
    monkeypatch.setattr(known, "os", disk)
    names = [served.submit(prompt, OUT) for prompt in PROMPTS]
    while not disk.reading.is_set():
        served.step()
    monkeypatch.setattr(loads, "HANGS_S", 0.0)
    served.finish()
    assert [served.outputs[name] for name in names] == stock[0]
    assert counts(served)["store_pages_read"] == 0 < counts(served)["store_pages_lost"]
    pages = served.pages_by_hash()
    disk.answers.set()
    get_kv_transfer_group().worker.stored._reading.submit(int).result()
    for key, held in served.pages_by_hash().items():
        assert all(torch.equal(page, was) for (_, page), (_, was) in zip(held, pages[key], strict=True))
    assert counts(served)["store_faults"] == served.statistics["store_faults"] == 0
    served.assert_drained()


def test_look_ups_that_hang_hold_nobody(
    served: Engine, stock: list[list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, has = threading.Event(), served.side.stored._store.has
    monkeypatch.setattr(look_ups, "LOOK_UP_S", 0.01)
    monkeypatch.setattr(served.side.stored._store, "has", lambda names: goes_on.wait(60) and has(names))
    assert served.generate(PROMPTS, OUT) == stock[0]
    served.submit(PROMPTS[0], 1)
    (asked,) = served.side.stored._asked.values()
    assert asked.stored.done() and asked.stored.result() == 0, "it is not even asked"
    served.finish()
    goes_on.set()
    served.assert_drained()


@pytest.mark.hazard(
    "Stored pages", "an error of the disk, while pages are written, read or looked up", "the store is off; answers stay"
)
@pytest.mark.parametrize("hook", ["put", *(pytest.param(hook, marks=SLOW) for hook in ("get", "has"))])
def test_a_fault_turns_the_store_off(
    hook: str, served: Engine, stock: list[list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise StoreError("no space left")

    worker = get_kv_transfer_group().worker.stored
    monkeypatch.setattr(served.side.stored._store if hook == "has" else worker._store, hook, broken)
    prompts = [prompt[:-3] + text(40, 50 + number) for number, prompt in enumerate(PROMPTS)]
    first = served.generate([*PROMPTS, *prompts], OUT)
    assert first[:3] == stock[0]
    for seed in range(77, 177):  # the fault comes from a thread, and is heard of in a later step
        if served.side.stored.off:
            break
        served.generate([text(40, seed)], OUT)
    assert served.side.stored.off and served.statistics["faults"] == 0
    assert counts(served)["store_faults"] + served.statistics["store_faults"] == 1
    before = served.statistics["store_hits"]
    assert served.generate([*PROMPTS, *prompts], OUT) == first and served.statistics["store_hits"] == before
    served.assert_drained()


@pytest.mark.hazard(
    "Stored pages",
    "weights change in a running engine, and its prefix cache is emptied",
    "nothing is loaded or stored under the name of the old weights",
)
@pytest.mark.parametrize("connector", [False, True], ids=["emptied", "and the connector is told"])
def test_other_weights_end_its_use(served: Engine, stock: list[list[Prompt]], connector: bool) -> None:
    assert served.llm.reset_prefix_cache(reset_connector=connector)
    assert served.generate(PROMPTS, OUT) == stock[0]
    assert counts(served)["store_pages_read"] == LOADED // BLOCK, "the weights are what they were"
    with torch.inference_mode():
        next(served.runner.get_model().parameters()).mul_(0.5)
    assert served.llm.reset_prefix_cache(reset_connector=connector)
    assert served.generate(PROMPTS, OUT) != stock[0]
    assert counts(served)["store_pages_read"] == LOADED // BLOCK and counts(served)["store_pages_written"] == 0
    assert counts(served)["store_faults"] == 1 and served.side.stored.off
    served.assert_drained()


@SLOW
def test_what_waits_for_the_disk_has_a_limit(
    calm: Path, tmp_path: Path, stock: list[list[Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda store, records: goes_on.wait(60) and put(store, records))
    with engine(calm, 60, {**EXACT, "store": str(tmp_path / "pages")}, **OPTIONS) as served:
        page = get_kv_transfer_group().worker.stored.layout.page_nbytes
        monkeypatch.setattr(stored, "WAITING_BYTES", 10 * page)
        assert served.generate(PROMPTS, OUT) == stock[0]
        goes_on.set()
        dropped = counts(served)["store_pages_dropped"]
        assert dropped > 0
    read = records(tmp_path / "pages")
    assert 0 < len(read) <= 10
