"""`jointkv evaluate` on a tiny model: rows for every method asked for, equal bytes, tasks, refusals."""

import json
from typing import Any

import pytest

from jointkv.errors import BadInput
from jointkv.evaluate.compare import suite
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.traffic import get_traffic
from jointkv.evaluate.traffic.base import Request
from jointkv.policy.profile import ReuseEvidence
from jointkv.policy.reuse import ReuseRule
from jointkv.theory.confidence import UpperLimit
from tests.cli.commands import refusal, run, save_tiny
from tests.core.profiles import make_profile
from tests.hf.reusing import text
from tests.hf.tiny_models import BLOCK, build_model


def evaluated(tmp_path, *arguments: str) -> dict:
    code, _, err = run("evaluate", *arguments, "--output", str(tmp_path / "out"), "--worker", str(tmp_path / "none"))
    assert code == 0, err
    return json.loads((tmp_path / "out" / "evaluate.json").read_text())


def test_methods_on_the_same_requests(tiny_long, tmp_path):
    small = ("--requests", "3", "--tokens", "4", "--generate", "3")
    found = evaluated(
        *(tmp_path, "--model", tiny_long, "--traffic", "near_prefix", "--method", "fused@0.9"),
        *(
            "--method",
            "exact_prefix",
            "--method",
            "snapkv",
            "--method",
            "quantized_pages@8",
            "--policy",
            "paper",
            *small,
        ),
    )
    assert found["format"] == "jointkv.evaluate/1" and found["traffics"]["near_prefix"]["requests"] == 3
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {"fused", "exact_prefix", "snapkv", "quantized_pages", "paper"}
    assert rows["exact_prefix"]["kl"] < 1e-9 and rows["exact_prefix"]["common_prefix"] == 3
    assert rows["fused"]["counted"] == "allocator" and rows["fused"]["level"] == 0.9
    assert 0 < rows["quantized_pages"]["share_16bit"] < 0.8 and rows["quantized_pages"]["kl"] > 0
    # Not installed here: said, not dropped, and asked for as many bytes as fusion takes.
    assert "setup-eval" in rows["snapkv"]["not_run"]
    assert len(rows["fused"]["per_request"]) == 3


def test_everything_runs_by_default_except_what_is_not_installed():
    names = {choice.method.name for choice in suite.choices_of([], [], None)}
    assert {"fused", "paper", "exact_prefix", "quantized", "minicache", "semantic", "snapkv", "kvzip"} <= names
    assert all(choice.level is None for choice in suite.choices_of([], [], None))


def test_a_profile_is_fusion_and_where_it_was_audited_reuse_by_its_rule():
    limit = UpperLimit(0.95)
    limit.observe(0.0)
    said = {"audits": 1, "blocks": 4, "missed_blocks": 0, "skipped": 0.5, "limit": 1.0, "evidence": limit.to_json()}
    audits = ReuseEvidence(**said, near=1.0, echoes=False, moved=ReuseEvidence(**said))
    without, having = (suite.choices_of([], [], make_profile((0.7,), reuse=found)) for found in (None, audits))
    assert [choice.method.name for choice in without] == ["profile"]
    fused, reused = having
    assert (fused.method.name, reused.method.name, reused.level) == ("profile", "profile_reuse", 0.7)
    with pytest.raises(BadInput, match="that of the profile"):
        reused.method.check_level(0.2)
    shared = tuple(text(10 * BLOCK, 1).tolist())
    prompts = [(*text(head, 2 + head).tolist(), *shared, 3) for head in (4, 7)]
    held: Any = reused.method.hold(
        Batch(build_model("llama"), [Request(each, (5, 6), "") for each in prompts], BLOCK), 0.7
    )
    pool = held.cache.pool
    assert pool.reuse.rule == ReuseRule(near=1.0, echoes=False) and pool.reuse.options.moved
    assert pool.policy.rule(0).max_relative_error == 0.7 and held.work.tokens == sum(map(len, prompts))


def test_long_documents_are_fused_inside_one_request():
    choice = suite.choices_of(["fused@0.3"], ["safe"], None)
    long, near = get_traffic("long_documents"), get_traffic("near_prefix")
    for method in (each.method for each in choice):
        inside: Any = method.in_scope(long.scope)
        across: Any = method.in_scope(near.scope)
        assert (inside.policy_at(0.3).scope, across.policy_at(0.3).scope) == ("chunk", "batch")


def test_tasks_are_paired_with_the_unfused_model(tiny_long, tmp_path, monkeypatch):
    monkeypatch.setattr("jointkv.evaluate.tasks.gsm8k.MAX_NEW_TOKENS", 16)
    found = evaluated(
        *(tmp_path, "--model", tiny_long, "--task", "gsm8k", "--examples", "2", "--task-batch", "2", "--policy", "safe")
    )
    assert found["rows"] == [] and [row["method"] for row in found["tasks"]] == ["unfused", "safe"]
    unfused, safe = found["tasks"]
    assert unfused["difference"] is None and set(safe["difference"]) == {"mean", "low", "high"}
    assert "GSM8K" in safe["source"] and len(safe["scores"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--traffic", "nothing"], "unknown traffic"),
        (["--method", "nothing"], "unknown method"),
        (["--method", "fused@much"], "with a number"),
        (["--method", "quantized@3"], "quantized"),
        (["--policy", "nothing"], "preset: 'nothing'"),
        (["--task", "nothing"], "unknown task"),
        (["--profile", "none.json"], "cannot read profile"),
        (["--traffic", "dataset:nothing"], "unknown data set"),
    ],
)
def test_bad_input_is_one_line(tiny_long, tmp_path, arguments, said):
    assert said in refusal("evaluate", "--model", tiny_long, *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_request_longer_than_the_context_is_refused(tmp_path):
    short = save_tiny(tmp_path / "short", tokens=64)
    options = ("--requests", 2, "--output", tmp_path / "out")
    assert "the model reads 64" in refusal("evaluate", "--model", short, *options)


def test_what_cannot_work_is_said_before_anything_takes_long(tiny_long, tmp_path):
    (tmp_path / "file").write_text("precious")
    said = refusal("evaluate", "--model", tiny_long, "--output", tmp_path / "file")
    assert "cannot make the folder" in said and (tmp_path / "file").read_text() == "precious"
    said = refusal("evaluate", "--model", tiny_long, "--task", "gsm8k", "--method", "snapkv@0.5")
    assert "tasks cannot run under snapkv here: it needs kvpress" in said


def test_tasks_run_under_what_was_asked_for():
    wanted = suite.task_methods(suite.choices_of(["quantized_pages", "fused@0.3"], ["safe"], None))
    assert [(method.name, level) for method, level in wanted] == [
        ("safe", 0.2),
        ("quantized_pages", 8.0),
        ("fused", 0.3),
    ]
    assert [method.name for method, _ in suite.task_methods(suite.choices_of([], [], None))] == ["safe", "paper"]


def test_finished_traffics_survive_a_later_one_that_breaks_off(tiny_long, tmp_path, monkeypatch):
    whole = suite.Suite.run_traffic

    def broken(self, traffic, *arguments):
        if traffic.name == "names":
            raise KeyboardInterrupt
        return whole(self, traffic, *arguments)

    monkeypatch.setattr(suite.Suite, "run_traffic", broken)
    options = ("--method", "fused@0.5", "--requests", 2, "--tokens", 2, "--output", tmp_path)
    assert run("evaluate", "--model", tiny_long, "--traffic", "near_prefix", "--traffic", "names", *options)[0]
    found = json.loads((tmp_path / "evaluate.json").read_text())
    assert [row["traffic"] for row in found["rows"]] == ["near_prefix"]
