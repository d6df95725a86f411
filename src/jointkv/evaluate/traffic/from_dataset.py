"""Traffic from a data set by name: each row's prompt, followed by its answer."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from jointkv.errors import BadInput
from jointkv.evaluate.datasets import ChoiceRow, Loaded, Row, get_dataset
from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, cut_request, encode

PREFIX = "dataset:"
MOST_ROWS = 2000
LEAST_TOKENS = 32
"""Two blocks of 16 tokens: a shorter prompt has next to nothing that could be shared."""
SHOTS = 5


class DatasetTraffic(Traffic):
    """The rows of one data set. `description` names the stand-in where it is one.

    Rows whose prompt would have fewer than `LEAST_TOKENS` tokens are not used. Of rows with choices the first `SHOTS`
    of a subject stand solved before each of its other questions, and are not asked.

    `prompt_tokens` cuts longer prompts to their beginning; then the prompt itself goes on in the continuation.
    """

    def __init__(self, dataset: str, prompt_tokens: int | None = None) -> None:
        if prompt_tokens is not None and prompt_tokens < LEAST_TOKENS:
            raise BadInput(f"prompt_tokens must be at least {LEAST_TOKENS}, got {prompt_tokens}")
        self._dataset = get_dataset(dataset)
        self._prompt_tokens = prompt_tokens
        self.name = f"{PREFIX}{self._dataset.name}"

    @cached_property
    def loaded(self) -> Loaded:
        """The first `MOST_ROWS` rows and their source, loaded on first use. Raises `BadInput`."""
        return self._dataset.load(MOST_ROWS)

    @property
    def description(self) -> str:  # type: ignore[override]
        """The data set, and where its rows really come from."""
        return f"{self._dataset.name}, {self.loaded.source}"

    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """Where the answer is missing or shorter than the continuation, the prompt's last tokens go with it."""
        rows, heads = _asked(self.loaded.rows)
        made: set[tuple[int, ...]] = set()
        short = 0
        for row in rng.sample(rows, len(rows)):
            head = heads[row.subject] if isinstance(row, ChoiceRow) else ""
            request = self._request(tokenizer, head, row, continuation_tokens)
            if request is None:
                short += 1
            elif request.prompt not in made:
                made.add(request.prompt)
                yield request
        raise BadInput(
            f"traffic {self.name!r} can make {len(made)} distinct requests with {continuation_tokens} continuation "
            f"tokens and this tokenizer, {count} requested; {short} of {len(rows)} rows leave fewer than "
            f"{LEAST_TOKENS} tokens for the prompt"
        )

    def _request(self, tokenizer: Tokenizer, head: str, row: Row, continuation_tokens: int) -> Request | None:
        text = head + row.text
        answer = row.answers[0] if row.answers else ""
        space = "" if not answer or text[-1].isspace() else " "
        whole = encode(tokenizer, f"{text}{space}{answer}")
        limits = [len(encode(tokenizer, text)), len(whole) - continuation_tokens]
        if self._prompt_tokens is not None:
            limits.append(self._prompt_tokens)
        split = min(limits)
        if split < LEAST_TOKENS:
            return None
        request = cut_request(tokenizer, whole[: split + continuation_tokens], split)
        return replace(request, answer=answer) if answer and split == limits[0] else request


def _asked(rows: Sequence[Row]) -> tuple[list[Row], dict[str, str]]:
    """The rows to ask, and by subject the solved questions that stand before those with choices."""
    solved: dict[str, list[str]] = {}
    asked: list[Row] = []
    for row in rows:
        shown = solved.setdefault(row.subject, []) if isinstance(row, ChoiceRow) else None
        if shown is None or len(shown) == SHOTS:
            asked.append(row)
        else:
            shown.append(f"{row.text} {row.answers[0]}\n\n")
    return asked, {subject: "".join(texts) for subject, texts in solved.items()}
