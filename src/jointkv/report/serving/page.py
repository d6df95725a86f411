"""The page: what `page.html.j2` shows, and how it is made from results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jointkv.bench.result import Arm
from jointkv.report.results import read_result
from jointkv.report.serving.cautions import cautions
from jointkv.report.serving.charts import Looks, styles
from jointkv.report.serving.page_charts import (
    break_even_charts,
    first_tokens,
    levels_and_ratios,
    page_style,
    timelines,
)
from jointkv.report.serving.pairs import arms_run, called, heading
from jointkv.report.serving.result import Serving, comparable, conditions
from jointkv.report.serving.table import BREAK_EVEN, RUNS, load_table, page_table
from jointkv.report.serving.verdict import RULES, WORDS, break_even, ranked, verdicts
from jointkv.report.template import render
from jointkv.system.files import replace_text

SETTINGS = ("model", "dtype", "traffic", "requests", "output_tokens", "block_size", "block_bytes", "seed", "rounds")


def write_page(paths: Sequence[Path], output: Path) -> None:
    """Write one self-contained HTML page on the results in `paths`; a file named twice counts once.

    Raises:
        BadInput: what `read_result` raises, or `output` cannot be written.
    """
    unique = list({path.resolve(): path for path in paths}.values())
    replace_text(output, page([(path, read_result(path, [Serving])) for path in unique]))


def page(files: Sequence[tuple[Path, Serving]]) -> str:
    """The page on results and the files they come from."""
    looks = styles([arm.name for _, result in files for arm in result.arms])
    with page_style():
        groups = [
            _group([(path, result) for path, result in files if any(result is one for one in together)], looks, number)
            for number, together in enumerate(comparable([result for _, result in files]))
        ]
    return render(
        "serving/page.html.j2",
        groups=groups,
        sections=[section for group in groups for section in group["sections"]],
        words=WORDS,
        kinds={word: kind for kind, word in WORDS.items()},
        rules=RULES,
        command="jointkv report html " + " ".join(path.name for path, _ in files),
    )


def _group(files: Sequence[tuple[Path, Serving]], looks: Looks, number: int) -> dict[str, Any]:
    """What the page shows of results of one model on one machine."""
    sections = [_section(*each, looks, f"result{number}-{place}") for place, each in enumerate(files)]
    found = ranked([verdict for section in sections for verdict in section["verdicts"]])
    return {
        "conditions": conditions(files[0][1]),
        "sections": sections,
        "break_even": break_even(found) if found else "",
        "charts": [break_even_charts(found, f"result{number}")] if len(found) > 1 else [],
        "table": page_table("", BREAK_EVEN, found),
    }


def _section(path: Path, result: Serving, looks: Looks, anchor: str) -> dict[str, Any]:
    """What the page shows of one result; of an absolute path only the name, for pages are shown to others."""
    return {
        "anchor": anchor,
        "path": path.name if path.is_absolute() else str(path),
        "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
        "result": result,
        "heading": heading(result),
        "verdicts": verdicts(result),
        "cautions": cautions(result),
        "charts": [first_tokens(result, looks, anchor), *levels_and_ratios(result, looks, anchor)],
        "tables": [load_table(result, load) for load in result.loads if arms_run(result, load)],
        "more_charts": [timelines(result, looks, anchor)],
        "runs": page_table(f"All {len(result.runs)} runs", RUNS, result.runs),
        "facts": {
            "Settings": {name.replace("_", " "): getattr(result, name) for name in SETTINGS}
            | {"flags of all arms": " ".join(result.common_flags) or "none"},
            "Arms": {called(arm): _facts(arm) for arm in result.arms},
            "Versions": result.versions,
            "Machine": {**result.machine, **{f"cores of the {name}": cores for name, cores in result.cores.items()}},
        },
    }


def _facts(arm: Arm) -> str:
    fusion = "no fusion" if arm.fusion is None else f"fusion {json.dumps(arm.fusion, sort_keys=True)}"
    return ", ".join((arm.title, f"{arm.pool_blocks:,} blocks", fusion, f"flags: {' '.join(arm.flags) or 'none'}"))
