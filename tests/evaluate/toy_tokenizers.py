"""Tokenizers of several kinds, trained on the packaged sample, and the real one."""

from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jointkv.evaluate.traffic import Tokenizer
from jointkv.evaluate.traffic.gsm8k import load_problems


class Remembering:
    """A tokenizer that does each text once: the same requests are drawn again and again here."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._found: dict[tuple[str, bool], Any] = {}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        key = text, add_special_tokens
        if key not in self._found:
            self._found[key] = self._tokenizer(text, add_special_tokens=add_special_tokens)
        return self._found[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def byte_level(*, single_digits: bool, bos: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer trained on the sample; with `bos` it starts every text with `<s>`."""
    raw = RawTokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if single_digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    raw.pre_tokenizer = pre_tokenizers.Sequence(steps)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<s>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([problem.worked for problem in load_problems()], trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")


def word_level() -> PreTrainedTokenizerFast:
    """A tokenizer of words and single signs; a digit run is one token, known or not."""
    raw = RawTokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    raw.train_from_iterator(
        [problem.worked for problem in load_problems()],
        trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def smollm2() -> Tokenizer:
    from jointkv.hf.models import fetch_model

    return AutoTokenizer.from_pretrained(fetch_model("smollm2"))


MAKERS = {
    "single_digits": lambda: byte_level(single_digits=True),
    "merged_digits": lambda: byte_level(single_digits=False),
    "with_bos": lambda: byte_level(single_digits=True, bos=True),
    "word_level": word_level,
    "smollm2": smollm2,
}
REAL = pytest.param("smollm2", marks=pytest.mark.real_model)
ALL = (*(maker for maker in MAKERS if maker != "smollm2"), REAL)
