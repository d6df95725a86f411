"""Records of a data set on the Hugging Face hub, through the optional library `datasets`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

HUB_TIMEOUT_S = 5.0


class HubUnavailable(Exception):
    """The hub did not deliver; the message says why. Never leaves this package."""


@dataclass(frozen=True)
class Hub:
    """A data set on the hub: a configuration of it, a folder of it, or a JSONL file in an archive of it.

    An archive serves where the rest is a loading script, which `datasets` no longer runs; it has no split.
    """

    repository: str
    config: str | None = None
    split: str = "test"
    folder: str | None = None
    archive: str | None = None
    archive_member: str | None = None

    def __str__(self) -> str:
        parts = (self.repository, self.config, self.folder, self.archive_member or self.split)
        return " ".join(part for part in parts if part is not None)


def fetch_records(
    hub: Hub, count: int | None, wanted: Callable[[Mapping[str, Any]], bool], *, offline: bool
) -> list[Mapping[str, Any]]:
    """The first `count` wanted records of `hub`; when `offline`, from the library's own cache only.

    Raises `HubUnavailable` when the library is missing or the hub does not answer within `HUB_TIMEOUT_S`.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise HubUnavailable(f"the package {error.name!r} is not installed") from error
    try:
        if not offline:
            # `datasets` itself retries for minutes.
            huggingface_hub.HfApi().dataset_info(hub.repository, timeout=HUB_TIMEOUT_S)
        # The cache holds whole splits only; online, a few rows should not cost a whole split.
        streaming = count is not None and not offline
        if hub.archive is None:
            records = datasets.load_dataset(
                hub.repository, hub.config, data_dir=hub.folder, split=hub.split, streaming=streaming
            )
        else:
            files = f"zip://{hub.archive_member}::hf://datasets/{hub.repository}/{hub.archive}"
            records = datasets.load_dataset("json", data_files=files, split="train", streaming=streaming)
        return list(islice((record for record in records if wanted(record)), count))
    except Exception as error:  # `datasets` lets its own, the hub's, the HTTP library's and the system's errors out
        first_line = str(error).partition("\n")[0]
        raise HubUnavailable(f"the hub does not deliver {hub} ({type(error).__name__}: {first_line})") from error
