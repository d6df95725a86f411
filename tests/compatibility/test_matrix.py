"""The committed table of releases is that of the committed result."""

import json
from pathlib import Path

from tests.compatibility.matrix import FORMAT, Row, what_runs

RESULT = Path(__file__).parents[2] / "docs" / "results" / "reliability" / "matrix.json"


def test_the_table_of_releases() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    assert result["format"] == FORMAT
    rows = [Row(**row) for row in result["rows"]]
    assert not [row.name for row in rows if row.supported and row.installed and (row.refusal or row.failed)]
    assert RESULT.with_suffix(".md").read_text(encoding="utf-8") == what_runs(rows)
