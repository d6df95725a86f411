"""The page: what `page.html.j2` shows, and how it is made from results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jointkv
from jointkv.bench.result import ServingResult
from jointkv.report.serving.break_even import Point, heading, in_words, points
from jointkv.report.serving.cautions import cautions
from jointkv.report.serving.figures import Chart, Figures
from jointkv.report.serving.metrics import DECISIVE, E2EL_P95, FAILED, ITL_P50, OUTPUT_RATE, TTFT_P50, TTFT_P95, Metric
from jointkv.report.serving.pairs import baseline, called
from jointkv.report.serving.pressure import explain
from jointkv.report.serving.reading import comparable, conditions, read
from jointkv.report.serving.svg import page_style
from jointkv.report.serving.table import KIND_WORDS, LoadTable, load_table
from jointkv.report.serving.verdict import RULES, Verdict, verdicts

SAMPLE_METRICS: tuple[Metric, ...] = (OUTPUT_RATE, TTFT_P50, TTFT_P95, ITL_P50, E2EL_P95, FAILED)
"""Of every run, in the list of all runs."""


@dataclass(frozen=True)
class Section:
    """One result.

    Attributes:
        path: its file; only the name of one given by its absolute path, for pages are shown to others.
        digest: SHA-256 of the file.
        charts, more_charts: by heading, before and behind the tables.
        facts: settings, versions, machine and commands, by heading; names and values.
    """

    anchor: str
    path: str
    digest: str
    result: ServingResult
    heading: str
    verdicts: list[Verdict]
    cautions: list[str]
    explanations: dict[str, list[str]]
    tables: list[LoadTable]
    charts: Mapping[str, list[Chart]]
    more_charts: Mapping[str, list[Chart]]
    facts: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Group:
    """Results of one model on one machine."""

    conditions: Mapping[str, str]
    sections: list[Section]
    points: list[Point]
    break_even: list[str]
    break_even_charts: list[Chart]


def write_page(paths: Sequence[Path], output: Path) -> None:
    """Write one self-contained HTML page on the results in `paths`; a file named twice counts once.

    Raises:
        BadInput: what `read` raises, or `output` cannot be written.
    """
    from jointkv.system.files import replace_text

    unique = list({path.resolve(): path for path in paths}.values())
    text = page([(path, read(path)) for path in unique])
    replace_text(output, text)


def page(files: Sequence[tuple[Path, ServingResult]]) -> str:
    """The page on results and the files they come from."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("jointkv.report.serving", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with page_style():
        groups = _groups(files)
    sections = [section for group in groups for section in group.sections]
    return environment.get_template("page.html.j2").render(
        groups=groups,
        sections=sections,
        kind_words=KIND_WORDS,
        rules=RULES,
        sample_metrics=SAMPLE_METRICS,
        decisive=DECISIVE,
        heading=heading,
        called=called,
        version=jointkv.__version__,
        command="jointkv report html " + " ".join(path.name for path, _ in files),
    )


def _groups(files: Sequence[tuple[Path, ServingResult]]) -> list[Group]:
    results = [result for _, result in files]
    figures = Figures(results)
    groups = []
    for number, together in enumerate(comparable(results)):
        found = points(together)
        sections = [
            _section(path, result, figures, f"result{number + 1}-{place + 1}")
            for place, (path, result) in enumerate(each for each in files if any(each[1] is one for one in together))
        ]
        drawn = list(figures.break_even(found)) if len(found) > 1 else []
        groups.append(Group(conditions(together[0]), sections, found, in_words(found) if found else [], drawn))
    return groups


def _section(path: Path, result: ServingResult, figures: Figures, anchor: str) -> Section:
    found = verdicts(result)
    return Section(
        anchor=anchor,
        path=path.name if path.is_absolute() else str(path),
        digest=_digest(path),
        result=result,
        heading=f"{result.traffic.replace('_', '-')}, pool of {baseline(result).pool_blocks:,} blocks",
        verdicts=found,
        cautions=cautions(result),
        explanations={called(verdict.pair.upper): explain(result, verdict.pair) for verdict in found},
        tables=[
            load_table(result, load) for load in result.loads if any(run.load == load.label for run in result.runs)
        ],
        charts={
            "Throughput and latency": list(figures.levels(result)),
            "Ratios, round by round": list(figures.ratios(result)),
        },
        more_charts={
            "How long the first token takes": list(figures.first_tokens(result)),
            "The pool and the queue over time": list(figures.over_time(result)),
        },
        facts=_facts(result),
    )


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "not known"


def _facts(result: ServingResult) -> dict[str, dict[str, str]]:
    arms = {
        called(arm): ", ".join(
            (
                arm.title,
                f"{arm.pool_blocks:,} blocks",
                "no fusion" if arm.fusion is None else f"fusion {json.dumps(arm.fusion, sort_keys=True)}",
                f"flags {' '.join(arm.flags)}" if arm.flags else "no further flags",
            )
        )
        for arm in result.arms
    }
    settings = {
        "model": result.model,
        "dtype": result.dtype,
        "traffic": f"{result.traffic}: {result.traffic_description}",
        "requests in a run": str(result.requests),
        "output tokens of a request": str(result.output_tokens),
        "tokens in a block": str(result.block_size),
        "bytes of a block": f"{result.block_bytes:,}",
        "seed": str(result.seed),
        "rounds": str(result.rounds),
        "loads": ", ".join(load.label for load in result.loads),
        "flags of all arms": " ".join(result.common_flags) or "none",
    }
    return {
        "Settings": settings,
        "Arms": arms,
        "Versions": dict(result.versions),
        "Machine": {**{name: str(value) for name, value in result.machine.items()}, **_cores(result.cores)},
    }


def _cores(cores: Mapping[str, str]) -> dict[str, Any]:
    return {f"cores of the {name.replace('_', ' ')}": value for name, value in cores.items()}
