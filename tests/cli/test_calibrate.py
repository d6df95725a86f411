"""`jointkv calibrate` on a tiny model: a profile that a cache takes, refusals that overwrite nothing."""

import json
import random
import re
from pathlib import Path

import pytest

from jointkv.evaluate.calibrate.run import Calibration
from jointkv.hf.models import load_model
from jointkv.hf.pool import JointPool
from jointkv.policy.profile import Profile
from tests.cli.commands import refusal, run, run_json

WORDS = ("apples", "pens", "left", "basket", "buys", "how", "many", "each", "day", "week", "cost", "dollars")
SHARED = " ".join(random.Random(1).choice(WORDS) for _ in range(25))


def write_requests(path: Path, count: int, **fields: str) -> Path:
    rng = random.Random(0)
    lines = []
    for number in range(count):
        tail = " ".join(rng.choice(WORDS) for _ in range(6))
        lines.append(json.dumps({"prompt": f"Session {number:03d}. {SHARED} {tail}", **fields}))
    path.write_text("\n".join(lines))
    return path


def command(tiny: str, folder: Path, target: str = "kl=0.5", tokens: int = 4, **fields: str) -> tuple[object, ...]:
    """A calibration on 16 requests that writes `folder / "p.json"`."""
    data = write_requests(folder / "log.jsonl", 16, **fields)
    options = ("--target", target, "--tokens", tokens, "--output", folder / "p.json")
    return ("calibrate", "--model", tiny, "--data", data, *options)


def calibrated(*arguments: object) -> Profile:
    code, _, err = run(*arguments)
    assert code == 0, err
    (output,) = (Path(str(arguments[place + 1])) for place, word in enumerate(arguments) if word == "--output")
    return Profile.load(output)


def test_a_profile_from_a_users_file(tiny: str, tmp_path: Path) -> None:
    options = command(tiny, tmp_path, "relative_error=0.9")
    code, out, err = run(*options, "--token-limit", 9, "--json", tmp_path / "copy.json")
    assert code == 0, err
    profile = Profile.load(tmp_path / "p.json")
    source = str(tmp_path / "log.jsonl")
    assert profile.data.source == source and profile.data.requests == 16 and profile.data.scored_tokens == 64
    assert profile.held_out.ratio > 1 and f"{profile.held_out.ratio:.2f}" in out
    assert json.loads((tmp_path / "copy.json").read_text())["met"] is True
    assert not (tmp_path / "p.json.work").exists()
    model, _ = load_model(tiny, dtype="float32")
    assert JointPool(model, profile).policy.max_relative_error == (0.9,)
    assert calibrated(*options, "--block-size", 8).block_size == 8


def test_generate_and_evaluate_take_the_profile_of_their_model_only(tiny: str, tmp_path: Path) -> None:
    profile = calibrated(*command(tiny, tmp_path, tokens=2))
    generate = ("generate", "How many apples?", "--model", tiny, "--max-new-tokens", 2)
    answer = run_json(*generate, "--profile", tmp_path / "p.json")
    assert answer["policy"]["max_relative_error"] == [profile.groups[0].max_relative_error]
    stranger = profile.model.model_copy(update={"checkpoint": "x", "weights": "y"})
    profile.model_copy(update={"model": stranger}).save(tmp_path / "other.json")
    for asked in (generate, ("evaluate", "--model", tiny, "--output", tmp_path / "out")):
        assert "same shape but other weights" in refusal(*asked, "--profile", tmp_path / "other.json")


def test_answers_of_the_file_are_what_is_scored(tiny: str, tmp_path: Path) -> None:
    written = command(tiny, tmp_path, answer=" how many apples are left in the basket each week")
    said = calibrated(*written).held_out.nll
    assert calibrated(*command(tiny, tmp_path)).held_out.nll < said  # its own words are likelier to the model


def test_a_short_answer_is_continued(tiny: str, tmp_path: Path) -> None:
    short, none = (calibrated(*command(tiny, tmp_path, **fields)).data for fields in ({"answer": " how"}, {}))
    assert short.scored_tokens == none.scored_tokens == 64 and short.sha256 != none.sha256


def test_a_work_folder_with_other_things_in_it_keeps_them(tiny: str, tmp_path: Path) -> None:
    work = tmp_path / "mine"
    work.mkdir()
    (work / "thesis.txt").write_text("precious")
    calibrated(*command(tiny, tmp_path, tokens=2), "--work", work)
    assert [path.name for path in work.iterdir()] == ["thesis.txt"]


def test_a_missed_target_writes_nothing(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Calibration, "_meets", lambda *_: False)
    (tmp_path / "p.json").write_text("precious")
    code, out, err = run(*command(tiny, tmp_path, tokens=2), "--json", "-")
    assert code == 1 and "misses kl=0.5" in err and json.loads(out)["met"] is False
    assert (tmp_path / "p.json").read_text() == "precious"


def test_a_target_that_cannot_be_met_shows_the_frontier_and_writes_nothing(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("precious")
    options = command(tiny, tmp_path, "ratio=100")
    code, out, err = run(*options)
    assert code == 1 and "settings considered" in out and "ratio=100 cannot be met" in err
    code, out, _ = run(*options, "--json", "-")
    assert code == 1 and len(json.loads(out)["frontier"]) > 1
    assert (tmp_path / "p.json").read_text() == "precious"


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
        (["--target", "kl=0.1", "--data", "single.jsonl"], "single.jsonl:1: a prompt of one token"),
        (["--target", "kl=0.1", "--data", "many.jsonl", "--block-size", "512"], "no request fills a block"),
        (["--target", "kl=0.1", "--output", "."], "is a folder"),
        (["--target", "kl=0.1", "--moved", "--layer-groups", "2"], "one layer group; leave them out"),
        (["--target", "kl=0.1", "--audits", "3", "--scope", "chunk"], "scope batch"),
        (["--target", "kl=0.1", "--data", "long.jsonl"], "long.jsonl:16: .* the model reads"),
    ],
)
def test_bad_input_is_one_line_and_overwrites_nothing(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_requests(tmp_path / "few.jsonl", 3)
    long = write_requests(tmp_path / "many.jsonl", 16).read_text().splitlines()
    long[15] = json.dumps({"prompt": "apples " * 3000})
    (tmp_path / "single.jsonl").write_text("\n".join([json.dumps({"prompt": "a"})] * 16))
    (tmp_path / "long.jsonl").write_text("\n".join(long))
    (tmp_path / "profile.json").write_text("precious")
    assert re.search(said, refusal("calibrate", "--model", tiny, "--tokens", "4", *arguments))
    assert (tmp_path / "profile.json").read_text() == "precious"
