"""Results of a calibration in between, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel

from jointkv.evaluate.calibrate.settings import CalibrationSettings
from jointkv.evaluate.holding import prefilled
from jointkv.evaluate.holding.prefilled import Prefilled
from jointkv.evaluate.traffic.base import Request
from jointkv.hf.identity import model_fingerprint
from jointkv.policy.profile import Measurement
from jointkv.system.files import make_folder, replace_text
from jointkv.theory.calibrate import Setting

MEASURED = TypeAdapter(list[tuple[Setting, Measurement]])


class Store:
    """Results in between, in files named after what they are results of. Without a folder it keeps nothing."""

    def __init__(
        self, folder: Path | None, model: PreTrainedModel, requests: Sequence[Request], settings: CalibrationSettings
    ) -> None:
        self._folder = folder
        self._prefills: list[Path] = []
        base = [model_fingerprint(model), str(model.dtype), str(settings.block_size)]
        self._prefill_key = base
        self._measure_key = [*base, digest(requests), str(settings.seed), settings.scope, str(settings.chunk_tokens)]
        self._measure_key += [str(settings.layer_groups), settings.across_layers, str(settings.token_limit)]
        if folder is not None:
            make_folder(folder)

    def prefilled(self, requests: Sequence[Request], make: Callable[[], Prefilled]) -> Prefilled:
        """What an earlier run has prefilled, or else what `make` returns, which is kept."""
        if self._folder is None:
            return make()
        path = self._folder / f"prefill-{_hash([*self._prefill_key, digest(requests)])}.safetensors"
        self._prefills.append(path)
        found = prefilled.load(path, requests)
        if found is None:
            found = make()
            prefilled.save(found, path)
        return found

    def measured(self, half: str) -> dict[Setting, Measurement]:
        """Measurements of an earlier run."""
        if self._folder is None or not self._path(half).exists():
            return {}
        try:
            return dict(MEASURED.validate_json(self._path(half).read_bytes()))
        except (OSError, ValidationError):  # damaged: measured again
            return {}

    def keep(self, half: str, measured: dict[Setting, Measurement]) -> None:
        """Remember the measurements of a half. Raises `BadInput`."""
        if self._folder is not None:
            rows = [[setting, row.model_dump()] for setting, row in measured.items()]
            replace_text(self._path(half), json.dumps(rows))

    def remove(self) -> None:
        """Delete what this calibration has kept, and the folder if nothing else is in it."""
        if self._folder is None:
            return
        for path in [*self._prefills, self._path("calibrated"), self._path("held_out")]:
            path.unlink(missing_ok=True)
        if self._folder.exists() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _path(self, half: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{half}-{_hash(self._measure_key)}.json"


def digest(requests: Sequence[Request]) -> str:
    """A hash of all token ids."""
    return _hash([json.dumps([request.prompt, request.continuation]) for request in requests])


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
