"""Which hazard a test stands for: `@pytest.mark.hazard(area, what goes wrong, what is promised)`.

`pytest --hazards=FILE` writes what the marked tests showed. Numbers that a test gives to `record_property` (steps,
merges, violations, ...) are added up per hazard. Tests marked `@pytest.mark.runs(what, model runner, scheduling)` show
what runs where. `python tests/hazards.py FILE...` writes the tables of such files, and of what benchmarks/soak.py
wrote, to docs/results/reliability.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROPERTY, RUNS = "hazard", "runs"
FOLDER = Path(__file__).parents[1] / "docs" / "results" / "reliability"
HEAD = """# Hazards, promises, tests and results

`passed` and `failed` count tests; the numbers after them are what those tests went through. The JSON files beside this
page hold their commands, and name the test files as they were called when they ran.
"""

FIRST, FIRST_AHEAD, SECOND, SECOND_AHEAD = WHERE = [
    (runner, scheduling) for runner in ("V1", "V2") for scheduling in ("synchronous", "a step ahead")
]
RUNS_HEAD = """# What runs where

Tests that passed, with each of vLLM's model runners and each order of scheduling: in engines with a model, and steps of
vLLM's scheduler under random events (admissions, preemptions, aborts, hits, resets, lost messages), with a worker that
has no model. In each it was checked what every request reads, and after most of them every table, page, hash and
reference.
"""


@dataclass
class Evidence:
    """What the tests of one hazard showed."""

    tests: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)
    numbers: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def runs(what: str, *where: tuple[str, str]) -> list[pytest.MarkDecorator]:
    """Marks for `pytest.param` or `pytestmark`: `what` runs at these places of `WHERE`."""
    return [pytest.mark.runs(what, runner, scheduling) for runner, scheduling in where]


class HazardReport:
    """Collects the reports of marked tests; registered only with `--hazards`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.evidence: dict[tuple[str, ...], Evidence] = defaultdict(Evidence)
        self.runs: dict[tuple[str, ...], Evidence] = defaultdict(Evidence)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Every test reports its set-up, call and tear-down; a set-up that ended well says nothing yet."""
        found = [
            collected[tuple(value)]
            for kind, collected in ((PROPERTY, self.evidence), (RUNS, self.runs))
            for name, value in report.user_properties
            if name == kind
        ]
        if (report.when == "teardown" and report.passed) or (report.when == "setup" and report.passed):
            return
        for evidence in found:
            evidence.tests.add(report.nodeid.partition("[")[0])
            evidence.outcomes[report.outcome] += 1
            evidence.seconds += report.duration
            for name, value in report.user_properties:
                if isinstance(value, int | float):
                    evidence.numbers[name] += value
                    evidence.numbers["machines"] += name == "steps"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the file."""
        document = {
            "schema": 1,
            "command": ["pytest", *map(str, session.config.invocation_params.args)],
            "hazards": _written(("area", "hazard", "promise"), self.evidence),
            "runs": _written(("what", "runner", "scheduling"), self.runs),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(document, indent=1) + "\n")


def _written(names: tuple[str, ...], evidence: dict[tuple[str, ...], Evidence]) -> list[dict[str, Any]]:
    return [
        {
            **dict(zip(names, values, strict=True)),
            "tests": sorted(found.tests),
            "outcomes": dict(found.outcomes),
            "numbers": dict(found.numbers),
            "seconds": round(found.seconds, 1),
        }
        for values, found in sorted(evidence.items())
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--hazards`."""
    parser.addoption("--hazards", type=Path, help="write what tests marked with a hazard showed to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Start collecting where the option is given; with several processes, in the one that gathers the reports."""
    path = config.getoption("--hazards")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(HazardReport(path), "hazard-report")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Properties travel with the reports, marks do not."""
    for kind in (PROPERTY, RUNS):
        for mark in item.iter_markers(kind):
            first, second, third = mark.args
            item.user_properties.append((kind, [first, second, third]))


def tables(files: list[Path]) -> str:
    """The page: a table per area, a row per hazard; a hazard that several files know appears as in the last one."""
    rows = {
        (row["area"], row["hazard"], row["promise"]): row
        for file in files
        for row in _rows(json.loads(file.read_text(encoding="utf-8")))
    }
    lines = [HEAD]
    for area in sorted({area for area, *_ in rows}):
        lines += [f"## {area}", "", "| hazard | promise | tests | result |", "| --- | --- | --- | --- |"]
        lines += [_line(row) for key, row in sorted(rows.items()) if key[0] == area]
        lines.append("")
    return "\n".join(lines)


def what_runs_where(files: list[Path]) -> str:
    """The other page: a row for what runs, a column for where."""
    found: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for file in files:
        for row in json.loads(file.read_text(encoding="utf-8")).get("runs", ()):
            found[row["what"]][row["runner"], row["scheduling"]] = _shown(row)
    heads = [f"{runner}, {scheduling}" for runner, scheduling in WHERE]
    lines = [RUNS_HEAD, f"| | {' | '.join(heads)} |", f"| --- |{' --- |' * len(WHERE)}"]
    lines += [
        f"| {what} | {' | '.join(cells.get(place, '-') for place in WHERE)} |" for what, cells in sorted(found.items())
    ]
    return "\n".join(lines) + "\n"


def _shown(row: dict[str, Any]) -> str:
    """One cell; what failed is not hidden."""
    outcomes, numbers = row["outcomes"], row["numbers"]
    engines, steps = outcomes.get("passed", 0) - numbers.get("machines", 0), numbers.get("steps", 0)
    parts = [f"{engines} in engines"] * (engines > 0) + [f"{steps:,} random steps"] * (steps > 0)
    if outcomes.get("failed"):
        parts.append(f"**{outcomes['failed']} failed**")
    return ", ".join(parts) or "-"


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document["hazards"] if "hazards" in document else [_soaked(document, arm) for arm in document["arms"]]


def _soaked(document: dict[str, Any], arm: str) -> dict[str, Any]:
    found = document["arms"][arm]
    counts = found["counts"]
    return {
        "area": "Soak",
        "hazard": f"{document['minutes']:g} minutes of random load at a full pool ({arm})",
        "promise": f"none of {len(found['violations'])} kinds of violation",
        "tests": ["benchmarks/soak.py"],
        "outcomes": {"violations": sum(found["violations"].values())},
        "numbers": {
            "requests": counts["requests"],
            "preemptions": counts["preemptions"],
            "merges": counts["witness"]["merges"],
            "run_again_alone": found["compared"]["requests"],
        },
    }


def _line(row: dict[str, Any]) -> str:
    files = sorted({f"`{test.partition('::')[0].removeprefix('tests/')}`" for test in row["tests"]})
    counts = [f"{count} {outcome}" for outcome, count in sorted(row["outcomes"].items(), reverse=True)]
    numbers = [f"{name.replace('_', ' ')} {value:,g}" for name, value in sorted(row["numbers"].items())]
    return f"| {row['hazard']} | {row['promise']} | {', '.join(files)} | {', '.join(counts + numbers)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Write the tables of the hazards, and what runs where, to {FOLDER}.")
    parser.add_argument("files", nargs="+", type=Path, help="what `pytest --hazards=FILE` wrote")
    files = parser.parse_args().files
    (FOLDER / "hazards.md").write_text(tables(files), encoding="utf-8")
    (FOLDER / "runs.md").write_text(what_runs_where(files), encoding="utf-8")


if __name__ == "__main__":
    main()
