"""`jointkv advise` and `jointkv traffic`: from a made log to text, JSON, picture and page."""

import json
from pathlib import Path

import pytest

from tests.cli.commands import refusal, run, run_json

PNG = b"\x89PNG\r\n"
TEXT = "Tom buys 12 pens and gives three of them to his sister, who has none. How many are left for him and for Ann?"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    file = tmp_path / "log.jsonl"
    rows = [{"prompt": f"Ticket {7919 * (number + 13)}. {TEXT}"} for number in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "half')
    return file


def test_text_json_picture_and_page(tiny: str, log: Path, tmp_path: Path) -> None:
    arguments = ("advise", log, "--model", tiny, "--block-size", 4, "--skip-bad", "--output", tmp_path / "out")
    found = run_json(*arguments)
    assert (found["format"], found["requests"], found["unusable"]) == ("jointkv.advice/1", 4, 1)
    assert found["same_tokens"] + found["moved_tokens"] > 0.5 * found["tokens"] and found["source"] == "log.jsonl"
    assert found["breaks"][0]["says"] == "a 6-digit number" and found["breaks"][0]["anchor"] == "Ticket "
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "a 6-digit number at token" in out and "caution: 1 entry could not be used: line 5: not JSON" in out
    assert (tmp_path / "out" / "advice.png").read_bytes().startswith(PNG)
    page = (tmp_path / "out" / "advice.html").read_text()
    assert "Rewriting the prompts is free" in page and "A 6-digit number at token" in page
    assert "line 5: not JSON" in page and "http" not in page.replace("http://www.w3.org", "").split("<body>")[1]


def test_results_make_pictures_again(tiny: str, log: Path, tmp_path: Path) -> None:
    result = tmp_path / "advice.json"
    run("advise", log, "--model", tiny, "--skip-bad", "--output", tmp_path, "--json", result)
    code, _, err = run("report", "plots", result, "--output", tmp_path / "plots")
    assert code == 0, err
    table = (tmp_path / "plots" / "advice.md").read_text()
    assert "| log.jsonl | 4 |" in table


def test_bad_input_is_one_line(tiny: str, log: Path, tmp_path: Path) -> None:
    where = ("--model", tiny, "--output", tmp_path)
    assert f"{log}:5: not JSON" in refusal("advise", log, *where)
    assert "cannot be read" in refusal("advise", tmp_path / "none.jsonl", *where)
    assert "even number" in refusal("advise", log, *where, "--block-size", 5)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps({"prompt": "How many pens has Tom?"}) + "\n")
    assert run("advise", good, *where, "--requests", 10**22)[0] == 0, "more than there are"
    (tmp_path / "empty.jsonl").write_text("")
    assert "no request that can be used" in refusal("advise", tmp_path / "empty.jsonl", *where)


def test_a_made_log_is_read_again(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "made.jsonl"
    code, _, err = run("traffic", "agent_turns_clock", "--model", tiny, "--requests", 6, "--output", file)
    assert code == 0 and f"wrote {file}" in err, err
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 6 and all(row["body"]["messages"][0]["role"] == "system" for row in rows)
    found = run_json("advise", file, "--model", tiny, "--output", tmp_path)
    assert found["tenants"] == 2 and found["breaks"][0]["says"] == "a clock"


def test_traffic_goes_to_stdout_and_unknown_ones_are_refused(tiny: str) -> None:
    code, out, _ = run("traffic", "names", "--model", tiny, "--requests", 2, "--output", "-")
    assert code == 0 and len(out.splitlines()) == 2
    assert "unknown traffic 'agents'; did you mean 'agent_turns'? Known: near_prefix" in refusal("traffic", "agents")
