"""Engines the plugin refuses to be attached to, each with the cause named."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec

from jointkv.errors import BadInput, InvalidPolicy, UnsupportedEngine
from jointkv.vllm_plugin import CONNECTOR_MODULE, SCHEDULER, WORKERS, engine_args
from jointkv.vllm_plugin.connector import PARTS
from jointkv.vllm_plugin.engine import check as engine_check
from jointkv.vllm_plugin.engine import uses
from jointkv.vllm_plugin.engine.check import check_connectors
from jointkv.vllm_plugin.engine.scheduler import JointScheduler
from jointkv.vllm_plugin.engine.uses import is_tested, vllm_version
from jointkv.vllm_plugin.metrics import NO_REUSE
from jointkv.vllm_plugin.settings import PluginSettings
from tests.vllm_plugin.engines import engine, released_at_exit

SIZES = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = FullAttentionSpec(**SIZES)
FOREIGN = "vllm.v1.core.sched.scheduler.Scheduler"
SLIDING = SlidingWindowSpec(**SIZES, sliding_window=64)
BY_KEYS = {"similarity": "key", "key_threshold": 0.8}
MOVED = {"reuse": "licensed", "moved": True}
RECURRENT = MambaSpec(block_size=32, shapes=((1,),), dtypes=(torch.float32,))


@pytest.fixture(autouse=True)
def _interfaces_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at each takes long, and has tests of its own."""
    monkeypatch.setattr(engine_check, "check_interfaces", lambda parts: None)


def config(**changes: Any) -> Any:
    """A stand-in for `VllmConfig` that is accepted; dotted names are set on top."""
    made = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            worker_cls=WORKERS["cpu"],
        ),
        kv_transfer_config=SimpleNamespace(kv_connector_module_path=CONNECTOR_MODULE),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False, enable_prefix_caching=True),
        scheduler_config=SimpleNamespace(scheduler_cls=SCHEDULER),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    for name, value in changes.items():
        owner: Any = made
        *path, last = name.split("__")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return made


def groups(*specs: Any) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


def layered(layers: int, count: int) -> Any:
    """`count` groups of a model with so many layers, over a million pages."""
    names = [f"layer.{number}" for number in range(layers)]
    size = layers // count
    made = [SimpleNamespace(kv_cache_spec=FULL, layer_names=names[i * size : (i + 1) * size]) for i in range(count)]
    return SimpleNamespace(kv_cache_groups=made, num_blocks=1_000_000)


def check(changed: Any, held: Any = None, **options: Any) -> tuple[int, ...]:
    return engine_check.check_engine(changed, held or groups(FULL), PluginSettings.parse(options), PARTS)


def test_the_usual_engine_is_accepted() -> None:
    assert check(config()) == (0,)
    assert check(config(), groups(SLIDING, FULL)) == check(config(), groups(RECURRENT, FULL)) == (1,)
    assert check(config(), groups(MLAAttentionSpec(**SIZES))) == (0,)
    assert check(config(speculative_config=SimpleNamespace(method="ngram"))) == (0,)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        (
            {"speculative_config": SimpleNamespace(method="eagle")},
            "speculative decoding by eagle; use",
        ),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "sharing of KV between layers"),
        ({"parallel_config__worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls"),
        ({"device_config__device_type": "cuda"}, "never run on cuda"),
    ],
)
def test_setups_that_are_refused(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(UnsupportedEngine, match=cause):
        check(config(**changes))


@pytest.mark.parametrize(
    ("held", "options", "cause"),
    [
        (groups(FULL), {"layer_groups": 2}, "layer_groups=2, but the engine keeps 1"),
        (groups(FULL, FULL), {}, "layer_groups=1, but the engine keeps 2"),
        (groups(SLIDING), {}, "no layer of this model has full attention"),
        (groups(RECURRENT), {}, "no layer of this model has full attention"),
        (groups(object()), {}, "kind object"),
        (groups(FULL), {"scope": "chunk", "chunk_tokens": 100}, "chunk_tokens=100 is not a multiple"),
        (groups(MLAAttentionSpec(**SIZES)), MOVED, "moved=true was not written for latent attention"),
        (groups(replace(FULL, dtype=torch.float8_e4m3fn)), MOVED, "fp8 pages.*--kv-cache-dtype"),
        (groups(replace(FULL, block_size=128)), MOVED, "even block size up to 64.*--block-size"),
    ],
)
def test_caches_that_are_refused(held: Any, options: dict[str, Any], cause: str) -> None:
    with pytest.raises(UnsupportedEngine, match=cause):
        check(config(), held, **options)


PAPER: dict[str, Any] = {"policy": "paper", "accept_unbounded": True}


@pytest.mark.parametrize(
    ("layers", "count", "options", "taking_part"),
    [
        (30, 15, {}, range(1, 14)),
        (30, 30, {}, range(2, 28)),
        (12, 3, {"skip_first_layers": 4, "skip_last_layers": 0}, (1, 2)),
        (8, 4, {"enabled": False}, range(4)),
    ],
)
def test_layers_that_are_left_out(layers: int, count: int, options: Any, taking_part: Any) -> None:
    found = check(config(), layered(layers, count), **{**PAPER, "layer_groups": count, **options})
    assert found == tuple(taking_part)


@pytest.mark.parametrize(
    ("layers", "count", "error", "cause"),
    [
        (
            30,
            10,
            InvalidPolicy,
            "skip_first_layers: 2 cuts a group of 3 layers; set layer_groups to 15, for groups of 2",
        ),
        (4, 2, UnsupportedEngine, "leave no layer"),
    ],
)
def test_groups_that_do_not_separate_the_layers_that_are_left_out(
    layers: int, count: int, error: type[Exception], cause: str
) -> None:
    with pytest.raises(error, match=cause):
        check(config(), layered(layers, count), **PAPER, layer_groups=count)


def test_signatures_that_take_too_much_memory() -> None:
    assert check(config(), layered(30, 1), candidates="both") == (0,)
    many = layered(30, 1)
    many.num_blocks = 10**11
    assert check(config(), many) == (0,)
    with pytest.raises(
        UnsupportedEngine, match=r"signature_size=32: signatures of 100000000000 pages.*candidates=tokens"
    ):
        check(config(), many, candidates="both")


@pytest.mark.parametrize(
    ("changes", "held", "cause"),
    [
        ({"scheduler_config__scheduler_cls": None}, groups(FULL), "the scheduler is vLLM's own.*reuse=off"),
        ({"scheduler_config__scheduler_cls": FOREIGN}, groups(FULL), f"the scheduler is {FOREIGN}.*reuse=off"),
        ({"cache_config__enable_prefix_caching": False}, groups(FULL), "no-enable-prefix-caching, or set reuse=off"),
        ({}, groups(SLIDING, FULL), "given back behind the window; set reuse=off"),
        ({}, groups(RECURRENT, FULL), "that of all text before; set reuse=off"),
    ],
)
def test_reuse_in_engines_that_it_was_not_written_for(changes: dict[str, Any], held: Any, cause: str) -> None:
    assert check(config(), reuse="licensed") == (0,)
    for reuse in ("licensed", "probed"):
        with pytest.raises(UnsupportedEngine, match=cause):
            check(config(**changes), held, reuse=reuse)
    for reuse in ("off", "auto"):
        assert check(config(**changes), held, reuse=reuse) == (len(held.kv_cache_groups) - 1,)
    obstacle = engine_check.reuse_obstacle(config(**changes), held)
    assert obstacle is not None and obstacle.reason in NO_REUSE
    assert engine_check.reuse_obstacle(config(), groups(FULL)) is None


def test_pipeline_stages_share_one_table() -> None:
    stages = config(parallel_config__pipeline_parallel_size=2)
    assert check(stages) == (0,)
    with pytest.raises(UnsupportedEngine, match=r"several pipeline stages.*layer_groups=1"):
        check(stages, groups(FULL, FULL), layer_groups=2)


@pytest.mark.parametrize("scheduler", [None, FOREIGN])
def test_directions_need_our_scheduler_which_gives_held_pages_back(scheduler: str | None) -> None:
    written = {"directions": "written", "own_norms": True, "candidates": "signature", **BY_KEYS}
    assert check(config(), **written) == (0,)
    with pytest.raises(UnsupportedEngine, match=r"directions=written.*--scheduler-cls.*directions=off"):
        check(config(scheduler_config__scheduler_cls=scheduler), **written)


def test_a_foreign_class_on_top_of_ours_is_welcome() -> None:
    class Mine(JointScheduler):
        pass

    assert check(config(scheduler_config__scheduler_cls=Mine), reuse="licensed") == (0,)


def test_an_untested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uses, "vllm_version", lambda: "0.34.0")
    with pytest.raises(UnsupportedEngine, match=r"vLLM 0\.34\.0 was never run.*0\.32.*allow_untested"):
        check(config())
    assert check(config(), allow_untested=True) == (0,)
    assert check(config(device_config__device_type="cuda"), allow_untested=True) == (0,)


def test_the_installed_version_is_a_tested_one() -> None:
    assert is_tested(vllm_version())


def test_a_real_engine_with_the_wrong_worker(calm: Path) -> None:
    arguments = {key: value for key, value in engine_args().items() if key != "worker_cls"}
    with pytest.raises(UnsupportedEngine, match="--worker-cls"), engine(calm, **arguments):
        pass


def test_a_real_engine_with_a_foreign_scheduler(calm: Path) -> None:
    arguments = {**engine_args(reuse="licensed"), "scheduler_cls": FOREIGN}
    with pytest.raises(UnsupportedEngine, match=FOREIGN), engine(calm, **arguments):
        pass


def test_a_real_engine_with_our_scheduler_and_no_connector(calm: Path) -> None:
    with (
        pytest.raises(UnsupportedEngine, match=r"without its connector.*drop --scheduler-cls"),
        engine(calm, scheduler_cls=SCHEDULER),
    ):
        pass


def test_a_real_engine_with_the_worker_but_no_connector(calm: Path) -> None:
    with (
        pytest.raises(UnsupportedEngine, match="without the jointkv connector"),
        engine(calm, worker_cls=WORKERS["cpu"]),
    ):
        pass


def several(*children: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": list(children)},
    }


OURS = engine_args()["kv_transfer_config"]
EXAMPLE = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("asked", "scheduler", "cause"),
    [
        (OURS, None, None),
        (several(OURS), None, None),
        (several(EXAMPLE, several(OURS)), SCHEDULER, None),
        (several(EXAMPLE, several(OURS)), None, f"needs its own scheduler.*{SCHEDULER}"),
        (several(EXAMPLE), SCHEDULER, "without the jointkv connector"),
        (several(OURS, OURS), SCHEDULER, "or with several of it"),
        (
            several(OURS, several({"kv_connector": "OffloadingConnector"}, {"kv_connector": "Mine"})),
            SCHEDULER,
            "beside OffloadingConnector, which remembers the pages.*; Mine, which was never read; leave it out",
        ),
        (
            several(OURS, {**EXAMPLE, "kv_connector_module_path": "mine"}),
            SCHEDULER,
            "beside ExampleConnector, which was",
        ),
    ],
)
def test_connectors_are_found_however_deep_they_stand(
    asked: dict[str, Any], scheduler: str | None, cause: str | None
) -> None:
    made = config(scheduler_config__scheduler_cls=scheduler)
    made.kv_transfer_config = SimpleNamespace(
        **{"kv_connector_module_path": None, "kv_connector_extra_config": {}, **asked}
    )
    with nullcontext() if cause is None else pytest.raises(UnsupportedEngine, match=cause):
        check_connectors(made)


def test_a_real_engine_with_a_connector_that_was_never_read(calm: Path) -> None:
    other = {**EXAMPLE, "kv_connector_module_path": ExampleConnector.__module__}
    refused = pytest.raises(UnsupportedEngine, match=r"does not work beside ExampleConnector, which was never read")
    with refused, engine(calm, **engine_args([other])):
        pass


def test_an_unknown_option_at_the_start_of_an_engine(calm: Path) -> None:
    arguments = engine_args()
    arguments["kv_transfer_config"]["kv_connector_extra_config"] = {"max_relativ_error": 0.1}
    with pytest.raises(BadInput, match="did you mean 'max_relative_error'"), engine(calm, **arguments):
        pass


def test_engines_start_after_refusals(calm: Path) -> None:
    with released_at_exit(), engine(calm, fusion={}) as served:
        assert len(served.generate([[1, 2, 3]], 2)[0]) == 2
