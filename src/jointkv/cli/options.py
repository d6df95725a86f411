"""Options that several verbs share, each declared once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ReuseOption(StrEnum):
    """Whether resident text is read before it is computed: never, with a licence from audits, or by evidence alone."""

    OFF = "off"
    LICENSED = "licensed"
    PROBED = "probed"


Model = Annotated[str, typer.Option(help="Known name, local folder or hub name.")]
Data = Annotated[Path | None, typer.Option(help="JSONL file of requests; without it, built-in traffic.")]
ScoredTokens = Annotated[int, typer.Option(min=1, help="True tokens scored after each prompt.")]
ChunkTokens = Annotated[int, typer.Option(min=1, help="Tokens per chunk of a request.")]
BlockSize = Annotated[int, typer.Option(min=1, help="Tokens per KV block.")]
Dtype = Annotated[str, typer.Option(help="Of the model and its KV cache.")]
Seed = Annotated[int, typer.Option(help="Seed of the requests.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - means stdout.")]
Reuse = Annotated[
    ReuseOption, typer.Option(help="Read resident text instead of computing it: with a licence from audits, or probed.")
]
