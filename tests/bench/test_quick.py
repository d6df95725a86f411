"""The pure parts of `jointkv bench quick`: arms, order, medians, JSON and messages. No engine runs here."""

import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jointkv.bench import engine_run, launch, quick
from jointkv.bench.engine_run import EngineRun, Measured
from jointkv.cli import bench as cli
from jointkv.cli import main
from jointkv.errors import BadInput
from jointkv.report.quick_table import HEADINGS, NOT_MEASURED, cells, markdown, ratio_lines

ARM_NAMES = ["stock", "fused", "stock_large_pool"]
ROUNDS = [[[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]], [[11], [12, 13]]]
SETTINGS = quick.QuickSettings(requests=2, output_tokens=4, pool_blocks=20, repeats=3)
MEASURED = Measured(
    seconds=2.0,
    output_tokens=8,
    tokens_per_s=4.0,
    prompt_tokens=5,
    prompt_tokens_per_s=5.0,
    steps=6,
    max_running=2,
    preemptions=0,
    ttft_p50=0.5,
    ttft_max=1.0,
    itl_p50=0.25,
    execute_seconds=1.5,
    foreign_cpu=0.01,
    peak_pool_usage=0.5,
    pages_freed=None,
    fusion=None,
    startup_seconds=3.0,
    outputs=["1 2 3 4", "5 6 7 8"],
)
RUN = EngineRun(
    model="m",
    prompts=[[1]],
    output_tokens=1,
    pool_blocks=2,
    block_size=16,
    max_running=1,
    max_batched_tokens=8,
    dtype="float32",
    seed=0,
    fusion=None,
)


class Log:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.fractions: list[float] = []
        self.said: list[str] = []

    def start(self, description: str) -> None:
        self.started.append(description)

    def part(self, fraction: float) -> None:
        self.fractions.append(fraction)

    def say(self, line: str) -> None:
        self.said.append(line)


class FakeEngine:
    """Stands for `launch`: the speed of a run is 10, 30, 40 tokens/s by arm, times the round."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, EngineRun]] = []

    def __call__(self, name: str, run: EngineRun, finished: Callable[[int], None]) -> Measured:
        self.runs.append((name, run))
        finished(1)
        arm, number = name.rsplit("-", 1)
        speed = {"stock": 10.0, "fused": 30.0, "stock_large_pool": 40.0}[arm] * int(number)
        outputs = ["1 2 3 4", "5 6 7 8" if arm == "stock_large_pool" else "5 6 7 9"]
        freed = 7 * int(number) if arm == "fused" else None
        return replace(MEASURED, tokens_per_s=speed, pages_freed=freed, outputs=outputs)


def run_fake(settings: quick.QuickSettings = SETTINGS) -> tuple[FakeEngine, Log, list[quick.Sample]]:
    engine, log = FakeEngine(), Log()
    return engine, log, quick.run_quick(settings, "folder", ROUNDS, engine, log)


def test_arms_take_turns_in_rotated_order_on_the_same_requests() -> None:
    engine, log, samples = run_fake()
    assert [name for name, _ in engine.runs] == [
        *("stock-1", "fused-1", "stock_large_pool-1"),
        *("fused-2", "stock_large_pool-2", "stock-2"),
        *("stock_large_pool-3", "stock-3", "fused-3"),
    ]
    for name, run in engine.runs:
        arm, number = name.rsplit("-", 1)
        assert run.prompts == ROUNDS[int(number) - 1] and run.seed == int(number) - 1 and run.model == "folder"
        assert run.pool_blocks == (160 if arm == "stock_large_pool" else 20)
        assert (run.fusion is not None) == (arm == "fused")
    assert [(sample.arm, sample.round) for sample in samples] == [
        (name.rsplit("-", 1)[0], int(name[-1])) for name, _ in engine.runs
    ]
    assert log.started[0] == "round 1 of 3, stock" and " left" in log.started[1] and log.fractions == [0.5] * 9
    assert log.said[1].startswith("round 1 of 3, fused: 30 tokens/s, at most 2 running")


def test_layer_groups_keep_the_bytes_of_the_pool() -> None:
    settings = replace(SETTINGS, fusion={"layer_groups": 5})
    assert [quick.pool_blocks(settings, arm) for arm in quick.ARMS] == [20, 100, 160]


def test_medians_ranges_and_outputs_by_arm() -> None:
    samples = run_fake()[2]
    stock, fused, large = quick.summarise(SETTINGS, samples)
    assert [summary.arm for summary in (stock, fused, large)] == ARM_NAMES
    assert set(stock.medians) == set(stock.ranges) == set(quick.METRICS)
    assert stock.medians["tokens_per_s"] == 20 and stock.ranges["tokens_per_s"] == (10, 30)
    assert fused.medians["pages_freed"] == 14 and stock.medians["pages_freed"] is stock.ranges["pages_freed"] is None
    assert [summary.outputs_equal_to_large_pool for summary in (stock, fused, large)] == [1, 1, 2]


def test_a_value_missing_in_one_round_is_not_a_median() -> None:
    samples = run_fake()[2]
    gap = [
        replace(sample, measured=replace(sample.measured, itl_p50=None)) if sample.round == 2 else sample
        for sample in samples
    ]
    assert quick.summarise(SETTINGS, gap)[0].medians["itl_p50"] is None
    assert quick.ratios(gap)["fused/stock"]["itl_p50"] is None


def test_ratios_are_medians_of_ratios_within_rounds() -> None:
    samples = run_fake()[2]
    # Round 3 was slow as a whole, the stock engine most of all: medians of the arms would say 60 / 20.
    slow = {"stock": 1.0, "fused": 4.0, "stock_large_pool": 5.0}
    samples = [
        replace(sample, measured=replace(sample.measured, tokens_per_s=slow[sample.arm]))
        if sample.round == 3
        else sample
        for sample in samples
    ]
    found = quick.ratios(samples)
    assert list(found) == ["fused/stock", "fused/stock_large_pool", "stock/stock_large_pool"]
    assert found["fused/stock"]["tokens_per_s"] == 3 and found["fused/stock"]["steps"] == 1
    assert found["fused/stock_large_pool"]["tokens_per_s"] == 0.75


def test_a_subset_of_arms_has_no_numbers_of_the_others() -> None:
    settings = replace(SETTINGS, arms=("fused", "stock"))
    engine, _, samples = run_fake(settings)
    assert [name for name, _ in engine.runs][:4] == ["stock-1", "fused-1", "fused-2", "stock-2"]
    assert [summary.outputs_equal_to_large_pool for summary in quick.summarise(settings, samples)] == [None, None]
    assert list(quick.ratios(samples)) == ["fused/stock"]


def test_time_left() -> None:
    assert quick.seconds_left({}, ["stock"]) is None
    assert quick.seconds_left({"stock": [2.0, 4.0]}, ["stock", "fused"]) == 6
    assert quick.seconds_left({"stock": [2.0], "fused": [10.0]}, ["stock", "stock_large_pool"]) == 8
    assert quick.about(89) == "about 89 s" and quick.about(150) == "about 2 min"


def test_table_never_writes_not_measured_as_zero() -> None:
    samples = run_fake()[2]
    summaries, ratios = quick.summarise(SETTINGS, samples), quick.ratios(samples)
    by_heading = [dict(zip(HEADINGS, cells(summary), strict=True)) for summary in summaries]
    assert [line["pages freed"] for line in by_heading] == [NOT_MEASURED, "14", NOT_MEASURED]
    assert by_heading[0]["tokens/s"] == "20.0 (10-30)" and by_heading[1]["same output"] == "1 of 2"
    assert ratio_lines(ratios)[0].startswith("fused / stock: tokens_per_s 3.00x")
    text = markdown(summaries, ratios)
    assert text.splitlines()[2].startswith("| stock | 20 | 20.0 (10-30) |") and "- fused / stock: " in text


@pytest.mark.parametrize(
    ("changes", "max_tokens", "message"),
    [
        ({"block_size": 24}, None, "multiple of 16, got 24"),
        ({"pool_blocks": 3}, None, "at least 4 blocks of 32"),
        ({}, 63, "67 tokens with its output; the model reads 63"),
    ],
)
def test_what_cannot_fit_is_refused(changes: dict[str, Any], max_tokens: int | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        quick.check_fit(replace(SETTINGS, **changes), [[0] * 63, [0]], max_tokens)


def test_a_request_that_just_fits() -> None:
    quick.check_fit(replace(SETTINGS, pool_blocks=4), [[0] * 92], 96)


def test_counters_of_the_warm_up_are_taken_off() -> None:
    before = {"pages_freed": 2, "state": "inert", "rejected": {"bound": 1}}
    after = {"pages_freed": 9, "state": "active", "rejected": {"bound": 4, "request_gone": 2}}
    expected = {"pages_freed": 7, "state": "active", "rejected": {"bound": 3, "request_gone": 2}}
    assert engine_run._difference(before, after) == expected
    assert engine_run._difference(None, None) is None


def test_environment_is_the_same_for_all_arms_and_leaves_this_process_alone() -> None:
    inherited = {"PATH": "/bin", "VLLM_CPU_OMP_THREADS_BIND": "auto"}
    made = launch.engine_environment(inherited, {5, 0, 1, 2}, 3 * launch.GIB + 1, local_model=True)
    assert made["PATH"] == "/bin" and made["VLLM_CPU_OMP_THREADS_BIND"] == "0-2,5" and made["OMP_NUM_THREADS"] == "4"
    assert made["VLLM_CPU_KVCACHE_SPACE"] == "4" and made["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert made["HF_HUB_OFFLINE"] == "1" and inherited["VLLM_CPU_OMP_THREADS_BIND"] == "auto"
    assert "HF_HUB_OFFLINE" not in launch.engine_environment({}, {0}, 1, local_model=False)


def test_a_disturbed_run_is_reported() -> None:
    def busy(name: str, run: EngineRun, finished: Callable[[int], None]) -> Measured:
        return replace(MEASURED, foreign_cpu=0.4)

    log = Log()
    quick.run_quick(replace(SETTINGS, arms=("stock",)), "folder", ROUNDS[:1], busy, log)
    assert "other processes took 40% of the cores" in log.said[0]


def child(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def launch_child(code: str, log_file: Path | None = None) -> tuple[Measured, list[int]]:
    progress: list[int] = []
    return launch.launch(RUN, {}, progress.append, log_file, child(code)), progress


def test_result_and_progress_come_from_the_process() -> None:
    code = f"""
        import json, sys
        run = json.load(sys.stdin)
        assert run["prompts"] == [[1]], run
        print(json.dumps({{"finished": 1}}))
        print("a line that is no message")
        print({json.dumps({"measured": asdict(MEASURED)})!r})
    """
    measured, progress = launch_child(code)
    assert measured == MEASURED and progress == [1]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.stdin.read(); print('one\\n\\ntwo', file=sys.stderr); raise SystemExit(3)", "one | two"),
        ("import sys; sys.stdin.read(); raise SystemExit(3)", "exit code 3 and an empty log"),
        ('import sys; sys.stdin.read(); print(\'{"error": "no fusion"}\')', "no fusion"),
        ("raise ValueError('early')", "ValueError: early"),
    ],
)
def test_a_failed_run_says_why(code: str, message: str, tmp_path: Path) -> None:
    log_file = tmp_path / "logs" / "stock-1.log"
    with pytest.raises(launch.EngineRunFailed) as caught:
        launch_child(code, log_file)
    assert message in str(caught.value) and str(caught.value).endswith(f"(log: {log_file})")
    assert log_file.is_file()


def test_an_interrupt_ends_the_process(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"""
        import os, pathlib, sys, time
        sys.stdin.read()
        pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))
        print('{{"finished": 1}}', flush=True)
        time.sleep(600)
    """

    def interrupt(finished: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.launch(RUN, {}, interrupt, None, child(code))
    assert not Path(f"/proc/{pid_file.read_text()}").exists()


def test_a_failed_arm_is_named() -> None:
    def fail(name: str, run: EngineRun, finished: Callable[[int], None]) -> Measured:
        raise launch.EngineRunFailed("out of memory")

    with pytest.raises(launch.EngineRunFailed, match="arm stock failed in round 1: out of memory"):
        quick.run_quick(SETTINGS, "folder", ROUNDS, fail, Log())


def run_command(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main.app, ["bench", "quick", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arm", "fast"), "unknown arm 'fast'; known: stock, fused, stock_large_pool"),
        (("--set", "max_relativ_error=1"), "did you mean 'max_relative_error'"),
        (("--set", "scope"), "expected KEY=VALUE"),
        (("--max-relative-error", "0.1", "--set", "max_relative_error=0.2"), "max_relative_error is given twice"),
        (("--min-pool-usage", "2"), "min_pool_usage"),
        (("--traffic", "heavy"), "unknown traffic 'heavy'"),
        (("--dtype", "int3"), "unknown dtype 'int3'"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, out, err = run_command("--output", str(tmp_path), *arguments)
    assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run_command("--output", str(tmp_path))
    assert code == 2 and "pip install 'jointkv[vllm]'" in err


def test_json_and_table_of_a_whole_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "_prepare", lambda settings: ("folder", ROUNDS, 64))
    monkeypatch.setattr(cli, "_launcher", lambda *arguments: FakeEngine())
    code, out, err = run_command("--requests", "2", "--output", str(tmp_path), "--json", "-", "--dtype", "float32")
    assert code == 0, err
    document = json.loads(out)
    assert document == json.loads((tmp_path / "quick.json").read_text())
    assert list(document) == [
        *("format", "settings", "fusion_settings", "prompt_tokens", "versions", "machine"),
        *("samples", "summary", "ratios"),
    ]
    assert document["format"] == "jointkv.bench.quick/1" and document["settings"]["dtype"] == "float32"
    assert document["fusion_settings"]["max_relative_error"] is not None
    assert {"python", "jointkv", "torch"} <= set(document["versions"])
    assert {"processor", "cores"} <= set(document["machine"])
    assert document["prompt_tokens"] == {"min": 1, "mean": 13 / 6, "max": 3}
    assert len(document["samples"]) == 9 and [line["arm"] for line in document["summary"]] == ARM_NAMES
    for sample in document["samples"]:
        assert {"arm", "round", "seed", "outputs_equal", "outputs", *quick.METRICS} <= set(sample)
        assert (sample["pages_freed"] is None) == (sample["arm"] != "fused")
    assert (tmp_path / "quick.md").read_text().count("\n| ") == 4 - 1 + 1
    code, out, _ = run_command("--requests", "2", "--output", str(tmp_path), "--dtype", "float32")
    assert code == 0 and "fused / stock: tokens_per_s 3.00x" in out and "max running" in out


def test_an_interrupted_command_exits_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_prepare", interrupt)
    code, _, err = run_command("--output", str(tmp_path))
    assert code == 130 and "interrupted" in err
