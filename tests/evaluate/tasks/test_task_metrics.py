"""LongBench's scores against values worked out by hand, and against what its own packages give."""

import pytest

from jointkv.evaluate.tasks.metrics import code_line, edit_similarity, normalized_words, rouge_l, token_f1


def test_normalisation_drops_case_punctuation_and_articles():
    assert normalized_words(" The  U.S. army, an 'other' theory-A ") == ["us", "army", "other", "theorya"]


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("The cat sat!", "a cat", 2 / 3),
        ("no", "no", 1.0),
        ("yes", "no", 0.0),
        ("", "no", 0.0),
        ("the", "a", 0.0),
        # Common words count as often as both have them: 2 of 3 and 2 of 2.
        ("go go go", "go go", 0.8),
    ],
)
def test_token_f1(answer, reference, score):
    assert token_f1(answer, reference) == pytest.approx(score)


def test_rouge_l():
    pytest.importorskip("rouge")
    # LCS "the cat on mat", and the package counts each distinct word once: 4 of 5 on both sides.
    assert rouge_l("the cat sat on the mat", "the cat lay on the mat") == pytest.approx(0.8, abs=1e-6)
    assert rouge_l("a b c d", "a c") == pytest.approx(2 / 3, abs=1e-6)
    assert rouge_l("b a", "a b") == pytest.approx(0.5, abs=1e-6)
    assert rouge_l("", "a b") == 0.0
    assert rouge_l("...", "a b") == 0.0
    assert rouge_l("word " * 3000, "a word") == 0.0


def test_the_first_line_of_code_counts():
    assert code_line("\n\n# comment\n```\nhttp://x\n  x = 1\ny = 2") == "  x = 1"
    assert code_line("# nothing\n`else`") == ""
    # An empty line is a line; only leading ones are skipped, as LongBench does.
    assert code_line("# comment\n\nx") == ""


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("x = 1\nrest", "x = 1", 1.0),
        ("x = 1", "x = 2", 0.8),
        ("", "x", 0.0),
        # 2 * 1 / 3 in whole percent.
        ("ab", "a", 0.67),
        # Where difflib and Levenshtein differ: difflib keeps to "cd" after the longest match, 2 * 2 / 8.
        ("abcd", "cdab", 0.5),
    ],
)
def test_edit_similarity(answer, reference, score):
    assert edit_similarity(answer, reference) == score
