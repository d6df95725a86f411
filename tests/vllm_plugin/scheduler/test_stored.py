"""Which requests ask a store, what they are offered, and what is offered to it; without an engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from jointkv.errors import StoreError
from jointkv.store import Record, Store
from jointkv.store.names import Names
from jointkv.store.records import NO_BASE
from jointkv.vllm_plugin.metrics import JointStats
from jointkv.vllm_plugin.scheduler import stored
from jointkv.vllm_plugin.scheduler.requests import isolation_key
from jointkv.vllm_plugin.scheduler.side import SchedulerSide
from jointkv.vllm_plugin.settings import PluginSettings
from tests.vllm_plugin.scheduling import BLOCK, TOKENS, new_manager, new_request, start, step_of

MODEL = "a model"
PROMPT = [*TOKENS, 7]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with the first three blocks of the prompt, of requests without a salt."""
    with Store(tmp_path / "pages") as store:
        named = Names(store.secret, MODEL, isolation_key(new_request({}))).of(TOKENS, BLOCK)
        store.put(Record(name.address, name.text, 0, NO_BASE, b"page") for name in named[:3])
        store.flush()
    return tmp_path / "pages"


def make(folder: Path, **settings: Any) -> SchedulerSide:
    options = {"min_pool_usage": 0.0, "store": str(folder), **settings}
    return SchedulerSide(PluginSettings(**options), new_manager(), (0,), stored_model=MODEL)


@pytest.fixture
def side(folder: Path) -> Iterator[SchedulerSide]:
    made = make(folder)
    yield made
    made.close()


def asked(side: SchedulerSide, computed: int = 0, request: Any = None, **identity: Any) -> int | None:
    """Tokens that a new request is offered, once the store has answered."""
    assert side.stored is not None
    request = request or new_request(identity, prompt_token_ids=PROMPT)
    side.admit(request)
    if request.request_id in side.stored._asked:
        side.stored._asked[request.request_id].stored.exception(timeout=60)
    return side.matched(request, computed)


def test_a_request_is_offered_what_is_stored_behind_what_is_there(side: SchedulerSide) -> None:
    assert asked(side) == 3 * BLOCK
    assert asked(side, 2 * BLOCK) == BLOCK and asked(side, 4 * BLOCK) == 0
    short = new_request({}, prompt_token_ids=TOKENS[: 2 * BLOCK])
    assert asked(side, request=short) == BLOCK, "its last token must be computed"


@pytest.mark.hazard(
    "Isolation",
    "stored pages are asked for with another salt, or by requests with LoRA adapters or media",
    "none is found, and nothing of the latter is stored",
)
def test_others_are_offered_nothing(side: SchedulerSide) -> None:
    assert asked(side, salt="red") == 0
    for number, identity in enumerate(({"adapter": ("red", 1, "/red")}, {"media": (("a", 40, 10),)})):
        assert asked(side, request=new_request(identity, f"other-{number}", prompt_token_ids=PROMPT)) == 0
    assert asked(side, request=new_request({}, "opted out", {"jointkv": "false"}, prompt_token_ids=PROMPT)) == 0
    assert side.stored is not None and list(side.stored._asked) == ["request"]


def test_strict_isolation_is_for_requests_with_a_salt(folder: Path) -> None:
    strict = make(folder, isolation="strict")
    assert asked(strict) == 0 and strict.stored is not None and not strict.stored._asked
    assert asked(strict, salt="red") == 0 and strict.stored._asked
    strict.close()


def test_it_waits_for_an_answer_and_not_for_ever(side: SchedulerSide, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, has = threading.Event(), Store.has
    monkeypatch.setattr(Store, "has", lambda store, addresses: goes_on.wait(60) and has(store, addresses))
    request = new_request({}, prompt_token_ids=PROMPT)
    side.admit(request)
    assert side.matched(request, 0) is None
    monkeypatch.setattr(stored, "LOOK_UP_S", 0.0)
    assert side.matched(request, 0) == 0
    goes_on.set()


def test_what_was_promised_is_loaded_once(side: SchedulerSide) -> None:
    request = new_request({}, prompt_token_ids=PROMPT)
    assert asked(side, request=request) == 3 * BLOCK
    new = start(side.tables._manager, request)
    side.allocate(request, new.block_ids, 3 * BLOCK)
    (load,) = side.next_inquiry(step_of()).loads
    assert load.request_id == "request" and load.pages.tolist() == new.block_ids[0][:3] and len(load.addresses) == 3
    assert not side.next_inquiry(step_of()).loads
    assert side.matched(request, 0) == 0, "what could not be loaded is computed"
    assert side.totals()["store_hits"] == 1 and side.totals()["store_tokens_loaded"] == 3 * BLOCK


def test_a_promise_is_kept_where_the_store_has_failed_since(side: SchedulerSide) -> None:
    request = new_request({}, prompt_token_ids=PROMPT)
    assert asked(side, request=request) == 3 * BLOCK
    side.hear(JointStats({"counters": {"store_faults": 1}}))
    new = start(side.tables._manager, request)
    side.allocate(request, new.block_ids, 3 * BLOCK)
    (load,) = side.next_inquiry(step_of()).loads
    assert load.pages.tolist() == new.block_ids[0][:3], "the worker says that they are lost, and they are computed"
    assert asked(side, request=new_request({}, "another", prompt_token_ids=PROMPT)) == 0


def test_what_is_exact_and_new_is_offered_once(side: SchedulerSide) -> None:
    def begin(name: str, tokens: int) -> Any:
        request = new_request({}, name, prompt_token_ids=PROMPT)
        asked(side, request=request)
        new = start(side.tables._manager, request)
        side.allocate(request, new.block_ids)
        return new, side.next_inquiry(step_of([new], {name: tokens})).save, request

    new, save, request = begin("first", 4 * BLOCK - 1)
    assert save is None, "three blocks are stored, and the last is not full"
    request.num_computed_tokens = 4 * BLOCK - 1
    save = side.next_inquiry(step_of(tokens={"first": 2})).save
    assert save is not None and save.pages.tolist() == [new.block_ids[0][3]] and save.positions.tolist() == [3 * BLOCK]
    assert begin("second", 4 * BLOCK + 1)[1] is None, "it was offered"


def test_nothing_is_offered_from_the_first_block_on_that_approximates(side: SchedulerSide) -> None:
    request = new_request({"salt": "red"}, prompt_token_ids=PROMPT)
    assert asked(side, request=request) == 0
    new = start(side.tables._manager, request)
    side.allocate(request, new.block_ids)
    tracked = side.requests.find("request")
    assert tracked is not None
    tracked.private_from = 2 * BLOCK
    save = side.next_inquiry(step_of([new])).save
    assert save is not None and save.pages.tolist() == new.block_ids[0][:2]
    assert side.matched(request, 0) == 0


@pytest.mark.parametrize("hook", ["has", "block"])
def test_an_error_ends_its_use_alone(hook: str, side: SchedulerSide, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise StoreError("no")

    assert side.stored is not None
    request = new_request({"salt": "red"}, prompt_token_ids=PROMPT)
    monkeypatch.setattr(side.stored._store if hook == "has" else side.stored._tables, hook, broken)
    assert asked(side, request=request) == 0
    new = start(side.tables._manager, request)
    side.allocate(request, new.block_ids)
    monkeypatch.setattr(side.candidates, "new_members", lambda output: iter(()))
    assert side.next_inquiry(step_of([new])).save is None
    assert side.stored.off and side.enabled and side.totals()["store_faults"] == 1 and side.totals()["faults"] == 0
