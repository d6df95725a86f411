"""A toy tokenizer, a tiny model, and a method that answers from a script."""

from __future__ import annotations

import copy
import json
import zlib

import torch
import transformers

from jointkv.evaluate.datasets import Loaded, Row
from jointkv.evaluate.holding.batch import Batch
from jointkv.evaluate.holding.held import HeldBatch
from jointkv.evaluate.methods.base import Method
from jointkv.evaluate.tasks.base import Example
from jointkv.evaluate.traffic.base import Request

VOCABULARY = 128
LOADED = Loaded("toy", "written here", False, (Row("a", ("b",)),))


class Characters:
    """One token per character, its code; `|` ends a text."""

    bos_token_id = None
    eos_token_id = ord("|")
    chat_template = None

    def __call__(self, text, *, add_special_tokens=True):
        return {"input_ids": [min(ord(letter), VOCABULARY - 1) for letter in text]}

    def decode(self, token_ids, *, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        return "".join(map(chr, token_ids)).replace("|", "" if skip_special_tokens else "|")


class Chat(Characters):
    """A user's message stands between angle brackets."""

    chat_template = "<{message}>"

    def apply_chat_template(self, messages, **options):
        (message,) = messages
        assert message["role"] == "user" and options["add_generation_prompt"] and not options["tokenize"]
        return self.chat_template.format(message=message["content"])


class Words(Characters):
    """One token per word, a hash of it; the letters A to D have tokens of their own."""

    eos_token_id = None

    def __call__(self, text, *, add_special_tokens=True):
        return {"input_ids": [self.token(word) for word in text.split()]}

    def token(self, word):
        return "ABCD".index(word) if word in tuple("ABCD") else 4 + zlib.crc32(word.encode()) % (VOCABULARY - 4)

    def decode(self, token_ids, *, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        return "".join(f" {token}" for token in token_ids)


class Script(Method):
    """Answers row `i` of a batch with `texts[i]`, one character a step, and with `|` from then on."""

    name, description, levels, level_means = "script", "answers from a script", (1.0,), "nothing"

    def __init__(self, *texts):
        self.texts, self.fed, self.batches = texts, [], []

    allowed = "1"

    def allows(self, level: float) -> bool:
        return level == 1

    def compress(self, batch: Batch, level: float) -> HeldBatch:
        self.batches.append(len(batch.requests))
        return _Scripted(self, len(batch.requests))


class _Scripted(HeldBatch):
    counted, nbytes = "predicted", 10

    def __init__(self, script, rows):
        self._script, self._rows, self._step = script, rows, 0

    def feed(self, tokens):
        rows, width = tokens.shape
        assert rows == self._rows
        self._script.fed += tokens.T.tolist()
        logits = torch.zeros(rows, width, VOCABULARY)
        for row, text in enumerate(self._script.texts[:rows]):
            for place in range(width):
                logits[row, place, ord((text + "|" * 99)[self._step + place])] = 1.0
        self._step += width
        return logits

    def fork(self):
        return copy.copy(self)


def example(prompt="ab", **fields):
    tokens = tuple(map(ord, prompt))
    return Example(**{"request": Request(tokens, (), prompt), "references": ("1",), "loaded_from": LOADED, **fields})


def tiny_model(context=2048):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
