"""Single long documents, one request each: the traffic for chunk scope."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from types import MappingProxyType

from pydantic import BaseModel

from jointkv.errors import BadInput
from jointkv.evaluate.jsonl import Text, located, read_records, validated
from jointkv.evaluate.samples import packaged
from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, cut_request, disjoint_runs
from jointkv.system.settings import Settings

# Below the data folder; prompts of LongBench in JSONL. The novel comes with jointkv.
FILES = MappingProxyType(
    {
        "code": "longbench/repobench-p.jsonl",
        "multi_hop": "longbench/hotpotqa.jsonl",
        "meeting": "longbench/qmsum.jsonl",
        "man_page": "text/ffmpeg_manpage.txt",
    }
)
KINDS = ("novel", *FILES)


class _Prompt(BaseModel):
    prompt: Text


@dataclass(frozen=True)
class LongDocuments(Traffic):
    """Prompts of `tokens` tokens, of the `kinds` in turn: the novel's packaged chapters, and what the data folder has.

    The same seed gives the same requests only with the same data folder; `kinds=("novel",)` needs none.
    """

    tokens: int = 4096
    kinds: tuple[str, ...] = KINDS

    scope = "chunk"
    name = "long_documents"
    description = "one document per request: a novel, and code, multi-hop passages, a meeting, a man page where at hand"

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            raise BadInput(f"kinds must be some of {', '.join(KINDS)}, got {', '.join(sorted(unknown)) or 'none'}")
        if self.tokens < 1:
            raise BadInput(f"tokens must be at least 1, got {self.tokens}")

    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """A continuation is what follows in the document."""
        by_kind = [self._pieces(tokenizer, kind, continuation_tokens) for kind in self.kinds]
        shuffled = [rng.sample(pieces, len(pieces)) for pieces in by_kind]
        for piece in chain.from_iterable(zip_longest(*shuffled)):
            if piece is not None:
                yield cut_request(tokenizer, piece, self.tokens)

    def _pieces(self, tokenizer: Tokenizer, kind: str, continuation_tokens: int) -> list[tuple[int, ...]]:
        """Disjoint stretches of the documents of one kind, each as long as a prompt with its continuation."""
        length = self.tokens + continuation_tokens
        pieces: list[tuple[int, ...]] = []
        for text, pieces_wanted in _documents(kind):
            pieces += islice(disjoint_runs(tokenizer, text.split("\n"), "\n", length), pieces_wanted)
        return list(dict.fromkeys(pieces))


def _documents(kind: str) -> Iterator[tuple[str, int | None]]:
    """The texts of one kind, and how many pieces to take of each; None for all."""
    if kind == "novel":
        yield packaged("novel_sample.txt").read_text(encoding="utf-8"), None
    folder = Settings.from_environment().data_dir
    if folder is None or kind not in FILES:
        return
    path = folder.expanduser() / FILES[kind]
    if path.suffix == ".txt" and path.exists():
        yield path.read_text(encoding="utf-8"), None
    elif path.exists():
        for record in read_records(path):
            with located(record.where):
                text = validated(_Prompt.model_validate, record.fields).prompt
            yield text, 1
