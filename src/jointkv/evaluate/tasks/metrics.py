"""LongBench's scores of a written answer against one reference, each from 0 to 1.

Source: Bai et al., "LongBench", arXiv 2308.14508; `metrics.py` and `eval.py` of `THUDM/LongBench`.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter

from jointkv.errors import BadInput

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized_words(text: str) -> list[str]:
    """Words in lower case, without ASCII punctuation and English articles (SQuAD's normalisation)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(answer: str, reference: str) -> float:
    """F1 of the bags of normalised words; 0 when they have none in common."""
    given, true = normalized_words(answer), normalized_words(reference)
    common = (Counter(given) & Counter(true)).total()
    if not common:
        return 0.0
    return 2 * common / (len(given) + len(true))


def rouge_l(answer: str, reference: str) -> float:
    """F of ROUGE-L as the package `rouge` computes it: union LCS over sentences, each distinct word once.

    An answer that the package refuses (no sentence in it) scores 0. Raises `BadInput` without the package.
    """
    try:
        from rouge import Rouge
    except ImportError as error:
        raise BadInput("ROUGE-L needs the package rouge: pip install 'jointkv[eval]'") from error
    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores(answer, reference)[0]["rouge-l"]["f"])
    # It also recurses once per word of a sentence, so an endless one, which no good answer has, is too deep.
    except (ValueError, RecursionError):
        return 0.0


def code_line(answer: str) -> str:
    """The first line that has no comment sign and no Markdown fence; empty if there is none."""
    lines = answer.lstrip("\n").split("\n")
    return next((line for line in lines if not any(sign in line for sign in ("`", "#", "//"))), "")


def edit_similarity(answer: str, reference: str) -> float:
    """Similarity of the answer's first line of code: matched characters over mean length, in whole percent.

    It is `fuzz.ratio` of `fuzzywuzzy` as LongBench installs it, that is without `python-Levenshtein`, and so `difflib`.
    """
    line = code_line(answer)
    if line == reference:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100
