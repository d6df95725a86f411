"""Traffic from a data set by name: each row's prompt, followed by its answer."""

import random
from functools import cached_property

from jointkv.errors import BadInput
from jointkv.evaluate.datasets import Loaded, Row, get_dataset
from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, check_counts, cut_request, encode, too_few

PREFIX = "dataset:"
MOST_ROWS = 2000


class DatasetTraffic(Traffic):
    """The rows of one data set. `description` names the stand-in where it is one.

    `prompt_tokens` cuts longer prompts to their beginning; then the prompt itself goes on in the continuation.
    """

    def __init__(self, dataset: str, prompt_tokens: int | None = None) -> None:
        if prompt_tokens is not None and prompt_tokens < 1:
            raise BadInput(f"prompt_tokens must be at least 1, got {prompt_tokens}")
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

    def requests(
        self, tokenizer: Tokenizer, count: int, *, continuation_tokens: int = 48, seed: int = 0
    ) -> list[Request]:
        """See `Traffic.requests`.

        Where the answer is missing or shorter than the continuation, the last tokens of prompt and answer are the
        continuation, so that it is true text in any case.
        """
        check_counts(count, continuation_tokens)
        rows = self.loaded.rows
        made: dict[tuple[int, ...], Request] = {}
        for row in random.Random(seed).sample(rows, len(rows)):
            request = self._request(tokenizer, row, continuation_tokens)
            if request is not None:
                made.setdefault(request.prompt, request)
            if len(made) == count:
                return list(made.values())
        raise too_few(self, count, len(made), continuation_tokens)

    def _request(self, tokenizer: Tokenizer, row: Row, continuation_tokens: int) -> Request | None:
        answer = row.answers[0] if row.answers else ""
        space = "" if not answer or row.text[-1].isspace() else " "
        whole = encode(tokenizer, f"{row.text}{space}{answer}")
        limits = [len(encode(tokenizer, row.text)), len(whole) - continuation_tokens]
        if self._prompt_tokens is not None:
            limits.append(self._prompt_tokens)
        split = min(limits)
        return cut_request(tokenizer, whole[: split + continuation_tokens], split) if split >= 1 else None
