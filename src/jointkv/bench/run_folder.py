"""The folder of a serving benchmark: every finished run at once in a file, so that what is interrupted can go on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from jointkv.bench.result import Key, Run, ServingResult
from jointkv.errors import BadInput
from jointkv.system.files import replace_text

RESULT = "serving.json"
SETTINGS = "settings.json"
RUNS = "runs"
OUTPUTS = ".outputs.json"
TEXTS = TypeAdapter(list[str])


class RunFolder:
    """Runs made with one set of settings, and their outputs.

    Args:
        settings: all that runs must have in common to be compared, as JSON; written to the folder.
        fresh: remove what other settings, or these, have left there.

    Raises:
        BadInput: the folder has runs made with other settings (named), or a file that cannot be read or written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder = folder
        settings = json.loads(json.dumps(settings))
        try:
            (folder / RUNS).mkdir(parents=True, exist_ok=True)
            if fresh:
                self._clear()
            self._check(settings)
        except OSError as error:
            raise BadInput(f"cannot use the folder {folder}: {error.strerror or error}") from None
        replace_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        self.runs: dict[Key, Run] = {}
        self.outputs: dict[Key, list[str]] = {}
        for file in self._run_files():
            self._read(file)

    def save(self, run: Run, texts: list[str]) -> None:
        """Keep a run and the texts of its answers. Raises `BadInput` when that cannot be written."""
        name = re.sub(r"[^\w.-]+", "-", f"{run.arm} {run.load} {run.round}")
        outputs = self.folder / RUNS / f"{name}{OUTPUTS}"
        run = run.model_copy(update={"outputs_file": f"{RUNS}/{outputs.name}"})
        # The outputs first: a run that is found has them.
        replace_text(outputs, json.dumps(texts, ensure_ascii=False, indent=1) + "\n")
        replace_text(self.folder / RUNS / f"{name}.json", run.model_dump_json(indent=1) + "\n")
        self.runs[run.key], self.outputs[run.key] = run, texts

    def with_what_was_asked(self, result: ServingResult) -> ServingResult:
        """`result` with divergences and scores of the one that is there, if that is of the same runs."""
        try:
            there = ServingResult.load(self.folder / RESULT)
        except BadInput:
            return result
        if not there.complete or there.runs != result.runs:
            return result
        return result.model_copy(update={"divergences": there.divergences, "scores": there.scores})

    def write_result(self, result: ServingResult) -> None:
        """Replace the result file. Raises `BadInput` when that cannot be."""
        replace_text(self.folder / RESULT, result.model_dump_json(indent=1) + "\n")

    def _run_files(self) -> list[Path]:
        files = sorted((self.folder / RUNS).glob("*.json"))
        return [file for file in files if not file.name.endswith(OUTPUTS)]

    def _clear(self) -> None:
        for file in [*(self.folder / RUNS).glob("*.json"), self.folder / SETTINGS, self.folder / RESULT]:
            file.unlink(missing_ok=True)

    def _check(self, settings: Mapping[str, Any]) -> None:
        if not self._run_files():
            return
        remedy = "choose another --output, or start anew with --fresh"
        try:
            old = dict(json.loads((self.folder / SETTINGS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            raise BadInput(f"{self.folder} has runs, and no {SETTINGS} that says what they are; {remedy}") from None
        different = sorted(name for name in {*old, *settings} if old.get(name) != settings.get(name))
        if different:
            name = different[0]
            raise BadInput(
                f"{self.folder} has runs with other settings ({', '.join(different)}; {name} was "
                f"{_short(old.get(name))}, is {_short(settings.get(name))}); {remedy}"
            )

    def _read(self, file: Path) -> None:
        try:
            run = Run.model_validate_json(file.read_bytes())
            texts = TEXTS.validate_json(file.with_name(f"{file.stem}{OUTPUTS}").read_bytes())
        except (OSError, ValidationError) as error:
            raise BadInput(f"{file} cannot be read ({type(error).__name__}); remove it to repeat this run") from None
        self.runs[run.key], self.outputs[run.key] = run, texts


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
