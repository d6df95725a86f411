"""`jointkv calibrate` on a tiny model: a profile that a cache takes, refusals that overwrite nothing."""

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jointkv.cli import main
from jointkv.hf.models import load_model
from jointkv.hf.pool import JointPool
from jointkv.policy.profile import Profile
from tests.cli.test_generate import save_tiny

WORDS = ("apples", "pens", "left", "basket", "buys", "how", "many", "each", "day", "week", "cost", "dollars")
SHARED = " ".join(random.Random(1).choice(WORDS) for _ in range(25))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def write_requests(path: Path, count: int, **fields) -> Path:
    rng = random.Random(0)
    lines = []
    for number in range(count):
        tail = " ".join(rng.choice(WORDS) for _ in range(6))
        lines.append(json.dumps({"prompt": f"Session {number:03d}. {SHARED} {tail}", **fields}))
    path.write_text("\n".join(lines))
    return path


def run(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(main.app, ["calibrate", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_profile_from_a_users_file(tiny, tmp_path):
    data, output = write_requests(tmp_path / "log.jsonl", 20), tmp_path / "p.json"
    options = ("--model", tiny, "--data", data, "--output", output, "--tokens", 4, "--json", tmp_path / "copy.json")
    code, out, err = run("--target", "relative_error=0.9", "--token-limit", 9, *options)
    assert code == 0, err
    profile = Profile.load(output)
    assert profile.data.source == str(data) and profile.data.requests == 20 and profile.data.scored_tokens == 80
    assert profile.held_out.ratio > 1 and f"{profile.held_out.ratio:.2f}" in out
    assert json.loads((tmp_path / "copy.json").read_text())["met"] is True
    assert not (tmp_path / "p.json.work").exists()
    model, _ = load_model(tiny, dtype="float32")
    assert JointPool(model, profile).policy.max_relative_error == (0.9,)
    code, out, err = run("--target", "relative_error=0.9", *options, "--block-size", "8")
    assert code == 0 and Profile.load(output).block_size == 8


def test_generate_and_evaluate_take_the_profile_of_their_model_only(tiny, tmp_path):
    data, output = write_requests(tmp_path / "log.jsonl", 16), tmp_path / "p.json"
    code, _, err = run("--model", tiny, "--data", data, "--target", "kl=0.5", "--tokens", 2, "--output", output)
    assert code == 0, err
    profile = Profile.load(output)
    invoke = CliRunner().invoke
    asked = ["generate", "How many apples?", "--model", tiny, "--max-new-tokens", "2", "--json", "-"]
    answer = json.loads(invoke(main.app, [*asked, "--profile", str(output)]).stdout)
    assert answer["policy"]["max_relative_error"] == [profile.groups[0].max_relative_error]
    other = output.with_name("other.json")
    stranger = profile.model.model_copy(update={"checkpoint": "x", "weights": "y"})
    profile.model_copy(update={"model": stranger}).save(other)
    for command in (asked, ["evaluate", "--model", tiny, "--output", str(tmp_path / "out")]):
        result = invoke(main.app, [*command, "--profile", str(other)])
        assert result.exit_code == 2 and "same shape but other weights" in " ".join(result.stderr.split())


def test_answers_of_the_file_are_what_is_scored(tiny, tmp_path):
    data = write_requests(tmp_path / "log.jsonl", 16, answer=" how many apples are left in the basket each week")
    code, _, err = run(
        *("--model", tiny, "--data", data, "--target", "kl=0.5", "--tokens", 4, "--output", tmp_path / "p.json")
    )
    assert code == 0, err
    said = Profile.load(tmp_path / "p.json").held_out.nll
    data = write_requests(tmp_path / "log.jsonl", 16)
    run(*("--model", tiny, "--data", data, "--target", "kl=0.5", "--tokens", 4, "--output", tmp_path / "q.json"))
    assert Profile.load(tmp_path / "q.json").held_out.nll < said  # its own words are likelier to the model


def test_a_work_folder_with_other_things_in_it_keeps_them(tiny, tmp_path):
    work = tmp_path / "mine"
    work.mkdir()
    (work / "thesis.txt").write_text("precious")
    data = write_requests(tmp_path / "log.jsonl", 16)
    code, _, err = run(
        *("--model", tiny, "--data", data, "--target", "kl=0.5", "--tokens", 2, "--work", work),
        *("--output", work / "profile.json"),
    )
    assert code == 0, err
    assert sorted(path.name for path in work.iterdir()) == ["profile.json", "thesis.txt"]


def test_a_short_answer_is_continued(tiny, tmp_path):
    seen = []
    for fields in ({"answer": " how"}, {}):
        data = write_requests(tmp_path / "log.jsonl", 16, **fields)
        run("--model", tiny, "--data", data, "--target", "kl=0.5", "--tokens", 4, "--output", tmp_path / "p.json")
        seen.append(Profile.load(tmp_path / "p.json").data)
    assert seen[0].scored_tokens == seen[1].scored_tokens == 64 and seen[0].sha256 != seen[1].sha256


def test_a_missed_target_writes_nothing(tiny, tmp_path, monkeypatch):
    from jointkv.evaluate.calibrate.run import Calibration

    monkeypatch.setattr(Calibration, "_meets", lambda *_: False)
    data, output = write_requests(tmp_path / "log.jsonl", 16), tmp_path / "p.json"
    output.write_text("precious")
    code, out, err = run(
        "--model", tiny, "--data", data, "--target", "kl=0.5", "--tokens", 2, "--output", output, "--json", "-"
    )
    assert code == 1 and "misses kl=0.5" in err and output.read_text() == "precious"
    assert json.loads(out)["met"] is False


def test_a_target_that_cannot_be_met_shows_the_frontier_and_writes_nothing(tiny, tmp_path):
    data, output = write_requests(tmp_path / "log.jsonl", 16), tmp_path / "p.json"
    output.write_text("precious")
    code, out, err = run("--model", tiny, "--data", data, "--target", "ratio=100", "--tokens", 4, "--output", output)
    assert code == 1 and "settings considered" in out and "ratio=100 cannot be met" in err
    assert output.read_text() == "precious"
    code, out, _ = run(
        "--model", tiny, "--data", data, "--target", "ratio=100", "--tokens", 4, "--output", output, "--json", "-"
    )
    assert code == 1 and len(json.loads(out)["frontier"]) > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "kl=-1"], "kl must be above 0"),
        (["--target", "speed=1"], "expected kl=NUMBER"),
        (["--target", "kl=0.1", "--requests", "15"], "at least 16"),
        (["--target", "kl=0.1", "--data", "few.jsonl"], "3 requests are too few"),
        (["--target", "kl=0.1", "--data", "none.jsonl"], "cannot be read"),
        (["--target", "kl=0.1", "--traffic", "nothing"], "unknown traffic"),
        (["--target", "kl=0.1", "--scope", "all"], "scope: 'all'"),
        (["--target", "kl=0.1", "--scope", "both"], "one at a time"),
        (
            ["--target", "kl=0.1", "--scope", "chunk", "--chunk-tokens", "40", "--data", "many.jsonl"],
            "no multiple of the block size",
        ),
        (["--target", "kl=0.1", "--layer-groups", "3", "--data", "many.jsonl"], "does not divide"),
        (["--target", "kl=0.1", "--data", "single.jsonl"], "line 1: a prompt of one token"),
        (["--target", "kl=0.1", "--data", "many.jsonl", "--block-size", "512"], "no request fills a block"),
        (["--target", "kl=0.1", "--output", "."], "is a folder"),
        (["--target", "kl=0.1", "--data", "long.jsonl"], "line 16: .* the model reads"),
    ],
)
def test_bad_input_is_one_line_and_overwrites_nothing(tiny, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    write_requests(tmp_path / "few.jsonl", 3)
    long = write_requests(tmp_path / "many.jsonl", 16).read_text().splitlines()
    long[15] = json.dumps({"prompt": "apples " * 3000})
    (tmp_path / "single.jsonl").write_text("\n".join([json.dumps({"prompt": "a"})] * 16))
    (tmp_path / "long.jsonl").write_text("\n".join(long))
    (tmp_path / "profile.json").write_text("precious")
    code, _, err = run("--model", tiny, "--tokens", "4", *arguments)
    assert code == 2 and len([line for line in err.splitlines() if line.startswith("error:")]) == 1
    import re

    assert re.search(said, err)
    assert (tmp_path / "profile.json").read_text() == "precious"
