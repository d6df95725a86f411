"""Texts that are tokenized line by line have the tokens of the whole, or are tokenized whole."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jointkv.evaluate.advise.tokenizing import LineTokenizer, Spelling, lines
from jointkv.evaluate.traffic.base import encode
from tests.evaluate.toy_tokenizers import ALL, MAKERS

TEXTS = ("", "one line", 'System: hi.\n{"a": 1}\n\n  b\n\tc\r\nd \n e\n', "\n\n\nx\n", "é\n漢字\n\U0001f600\n")


@pytest.mark.parametrize("maker", ALL)
def test_tokens_are_those_of_the_whole(maker: str) -> None:
    tokenizer = MAKERS[maker]()
    encoder = LineTokenizer(tokenizer)
    found = encoder([*TEXTS, *TEXTS], [True] * 2 * len(TEXTS))
    assert [tuple(row.tolist()) for row in found] == [encode(tokenizer, text) for text in (*TEXTS, *TEXTS)]
    assert encoder.by_lines


@settings(max_examples=60)
@given(st.text(st.sampled_from('ab1. \n\t{"'), max_size=40))
def test_lines_together_are_the_text(text: str) -> None:
    parts = lines(text)
    assert "".join(parts) == text
    assert all(part.endswith("\n") and not part[-2:-1].isspace() for part in parts[:-1])


def test_a_tokenizer_that_joins_lines_gets_whole_texts() -> None:
    class Joining:
        """Begins every text with a token of its own, as those do that put a blank in front."""

        bos_token_id = None

        def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
            return {"input_ids": [[999, *text.encode()] for text in texts]}

    encoder = LineTokenizer(Joining())
    (row,) = encoder(["a\nb"], [False])
    assert row.tolist() == [999, *b"a\nb"] and not encoder.by_lines
    assert encoder(["c\nd"], [False])[0].tolist() == [999, *b"c\nd"]


@pytest.mark.parametrize("maker", ALL)
def test_spelled_tokens_are_the_text(maker: str) -> None:
    tokenizer = MAKERS[maker]()
    ids = list(encode(tokenizer, "Tom buys 12 pens, on 2026-03-02."))
    spelled = "".join(Spelling(tokenizer).words(ids)).replace(" ", "")
    assert spelled.removeprefix("<s>") == "Tombuys12pens,on2026-03-02." or maker == "word_level"
