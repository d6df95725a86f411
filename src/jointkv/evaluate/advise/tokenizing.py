"""Token ids of many texts that have lines in common: each line is tokenized once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from jointkv.core.reuse import Integers
from jointkv.evaluate.traffic.base import begins_with_bos

_LINE_END = re.compile(r"\n(?=\S)")
MOST_CHARACTERS = 16_000_000
"""Of lines that are remembered."""
CHECKED_FIRST, CHECKED_EVERY = 64, 101


class LineTokenizer:
    """Tokenizes texts line by line, as long as that gives the tokens of the whole.

    Most tokenizers split a text at the end of a line, between two signs that are no blanks, before they do anything
    else. Whether this one does is checked with the first texts, and with some of the later ones; if not, all texts from
    there on are tokenized whole.

    Args:
        tokenizer: of the `transformers` library.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
        self._known: dict[str, Integers] = {}
        self._characters = self._texts = 0
        self.by_lines = True

    def __call__(self, texts: Sequence[str], bos: Sequence[bool]) -> list[Integers]:
        """Ids of each text, int64 `[n]`; with a beginning-of-sequence token where `bos`, if this tokenizer has one."""
        rows = self._rows(texts)
        first = np.array(self._bos, np.int64)
        return [np.concatenate((first, row)) if wanted else row for row, wanted in zip(rows, bos, strict=True)]

    def _rows(self, texts: Sequence[str]) -> list[Integers]:
        if not self.by_lines:
            return self._encoded(texts)
        checked = [at for at in range(len(texts)) if self._is_checked(self._texts + at)]
        self._texts += len(texts)
        pieces = [lines(text) for text in texts]
        self._learn({piece for each in pieces for piece in each})
        rows = [np.concatenate([self._known[piece] for piece in each]) for each in pieces]
        for at, whole in zip(checked, self._encoded([texts[at] for at in checked]), strict=True):
            if not np.array_equal(whole, rows[at]):
                self.by_lines = False
                self._known.clear()
                return self._encoded(texts)
        return rows

    def _is_checked(self, number: int) -> bool:
        return number < CHECKED_FIRST or number % CHECKED_EVERY == 0

    def _learn(self, wanted: Iterable[str]) -> None:
        new = [piece for piece in wanted if piece not in self._known]
        if self._characters > MOST_CHARACTERS:
            self._known.clear()
            self._characters, new = 0, list(wanted)
        self._characters += sum(map(len, new))
        self._known.update(zip(new, self._encoded_lines(new), strict=True))

    def _encoded_lines(self, pieces: Sequence[str]) -> list[Integers]:
        """By what is inside the tokenizer, where it has that: what is around it costs as much again for a line."""
        inside = getattr(self._tokenizer, "backend_tokenizer", None)
        if inside is None:
            return self._encoded(pieces)
        found = inside.encode_batch_fast(pieces, add_special_tokens=False)
        return [np.array(each.ids, np.int64) for each in found]

    def _encoded(self, texts: Sequence[str]) -> list[Integers]:
        if not texts:
            return []
        found = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [np.array(ids, np.int64) for ids in found]


def lines(text: str) -> list[str]:
    """`text` cut behind every line end that stands between two signs that are no blanks; together they are the text."""
    cuts = [0]
    for found in _LINE_END.finditer(text):
        at = found.start()
        if at and not text[at - 1].isspace():
            cuts.append(at + 1)
    cuts.append(len(text))
    return [text[start:end] for start, end in pairwise(cuts)]


class Spelling:
    """Tokens as text, one by one, so that a place in the text is a place among the tokens.

    Signs of several tokens come out as replacement characters; nothing here depends on them.

    Args:
        tokenizer: of the `transformers` library.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def words(self, ids: list[int]) -> list[str]:
        """The text of each token."""
        for token in ids:
            if token not in self._known:
                self._known[token] = self._spelled(token)
        return [self._known[token] for token in ids]

    def _spelled(self, token: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and piece.startswith("▁"):
            return piece.replace("▁", " ")
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text
