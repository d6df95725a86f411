"""What every data set is made of: where it lives, what stands in for it, and rows of a known type."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jointkv.errors import BadInput
from jointkv.evaluate.datasets.hub import Hub, HubUnavailable, fetch_records
from jointkv.evaluate.datasets.rows import Record, Row
from jointkv.evaluate.jsonl import located, read_records, validated
from jointkv.evaluate.samples import packaged
from jointkv.system.settings import Settings


@dataclass(frozen=True)
class Local:
    """A file below the data folder, and what it holds; `packaged` names a part of it that comes with jointkv."""

    file: str
    description: str
    packaged: str | None = None
    packaged_description: str = ""


@dataclass(frozen=True)
class Loaded:
    """The rows of a data set, and where they really come from.

    `stand_in` says that they are another data set's rows, which `source` then names.
    """

    name: str
    source: str
    stand_in: bool
    rows: tuple[Row, ...]


class Dataset:
    """A data set by its name in the literature. Adding one: a class, its records, and a line in `__init__.py`.

    `copy` is a local copy of the data set itself, `stand_in` the nearest other one; at most one of them is set.
    `record` is what the hub has, and `local_record` what the local file has, where that differs.
    """

    name: str
    hub: Hub
    copy: Local | None = None
    stand_in: Local | None = None

    record: type[Record]
    local_record: type[Record] | None = None

    def local_rows(self, path: Path) -> Iterator[Row]:
        """The rows of the local file, by default JSONL. Raises `BadInput` as `file:line: reason`."""
        for record in read_records(path):
            with located(record.where):
                row = validated((self.local_record or self.record).model_validate, record.fields).row()
                if row is None:
                    raise BadInput(f"not a row of {self.name}")
            yield row

    def load(self, count: int | None = None) -> Loaded:
        """The first `count` rows (default: all), from the hub, else from the data folder, else as packaged.

        Raises `BadInput` when there are none anywhere, and for a row with missing or malformed fields.
        """
        if count is not None and count < 1:
            raise BadInput(f"count must be at least 1, got {count}")
        settings = Settings.from_environment()
        try:
            records = fetch_records(self.hub, count, self._is_wanted, offline=settings.hf_hub_offline)
        except HubUnavailable as reason:
            return self._load_local(count, settings.data_dir, str(reason))
        rows = []
        for number, record in enumerate(records):
            with located(f"{self.hub}, row {number}"):
                rows.append(validated(self.record.model_validate, record).row())
        return Loaded(self.name, f"hub: {self.hub}", False, tuple(row for row in rows if row is not None))

    def _is_wanted(self, record: Mapping[str, Any]) -> bool:
        """Whether a record of the hub counts as one of `count`."""
        return True

    def _load_local(self, count: int | None, data_dir: Path | None, reason: str) -> Loaded:
        local = self.copy or self.stand_in
        if local is None:
            raise BadInput(f"data set {self.name!r}: {reason}, and nothing local stands in for it; {_REMEDY}")
        path = None if data_dir is None else data_dir.expanduser() / local.file
        if path is not None and path.exists():
            place, description = "local", local.description
        elif local.packaged is not None:
            place, description = "packaged", local.packaged_description
            path = packaged(local.packaged)
        else:
            missing = "JOINTKV_DATA_DIR is not set" if path is None else f"{path} does not exist"
            raise BadInput(f"data set {self.name!r}: {reason}, and {missing}; {_REMEDY} with {local.file}")
        rows = tuple(islice(self.local_rows(path), count))
        if self.stand_in is not None:
            return Loaded(self.name, f"{place} stand-in: {description} (for {self.name})", True, rows)
        return Loaded(self.name, f"{place} copy: {description}", False, rows)


_REMEDY = "install 'jointkv[eval]' where the hub can be reached, or set JOINTKV_DATA_DIR to a folder"
