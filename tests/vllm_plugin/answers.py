"""What requests must be answered, whatever the plugin does, without knowing what it does.

K and V of models that are written here depend on a token and its position alone, never on what stands before it. So
every page that holds the right text, at the right position or turned to it, holds what the request itself would have
computed, and answers are those of stock vLLM up to rounding, for any bounds. Attention is flat and counts for much: one
wrong token among hundreds shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import Exaone4Config, Exaone4ForCausalLM, Glm4Config, Glm4ForCausalLM

from tests.vllm_plugin.engines import VOCABULARY, Engine, Prompt, engine, random_model, text
from tests.vllm_plugin.test_reuse_traffic import BLOCK, Traffic

LIKELIEST = 5
"""Tokens of which log-probabilities are compared, at every position."""

LONGEST = 640
"""Tokens of a prompt at the most."""

CROWD = 16
"""Requests that wait or run at a time: of those in a long line most would run when nothing else happens any more."""

Likeliest = dict[int, float]
"""Log-probabilities by token."""

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_context_free(folder: Path, rope: dict[str, Any] | None = None, window: int | None = None) -> Path:
    """A random EXAONE 4 of two layers to `folder`, which norms behind attention and not before it.

    Attention writes to one half of the hidden states, which the head alone reads. What makes Q, K and V reads the other
    half, to which only the embeddings and what works on single tokens write.

    Args:
        rope: how keys are turned; None: as is usual.
        window: tokens that the first layer looks back, in whose company the second turns no keys.
    """
    config = Exaone4Config(
        **SIZES,
        num_hidden_layers=2,
        layer_types=["full_attention" if window is None else "sliding_attention", "full_attention"],
        sliding_window=window,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        architectures=["Exaone4ForCausalLM"],
    )
    model = random_model(Exaone4ForCausalLM, config)
    half = config.hidden_size // 2
    with torch.no_grad():
        model.model.embed_tokens.weight[:, half:] = 0
        for layer in model.model.layers:
            attention, words = layer.self_attn, layer.mlp
            for reads in (attention.q_proj, attention.k_proj, attention.v_proj, words.gate_proj, words.up_proj):
                reads.weight[:, half:] = 0
                reads.weight *= 2**0.5
            layer.post_attention_layernorm.weight[:half] = 0
            layer.post_feedforward_layernorm.weight[half:] = 0
    model.save_pretrained(folder)
    return folder


def write_neighbours(folder: Path) -> Path:
    """A random GLM-4 of one layer to `folder`: half of each key is turned, neighbours with each other."""
    config = Glm4Config(
        **SIZES,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        pad_token_id=None,
        eos_token_id=None,
        architectures=["Glm4ForCausalLM"],
    )
    random_model(Glm4ForCausalLM, config).save_pretrained(folder)
    return folder


@dataclass
class Answer:
    """What a client was told.

    Attributes:
        prompt, tokens: of the request, and of the answer as far as it came.
        likeliest: log-probabilities of the likeliest tokens and the one that was taken, for each one of the answer.
        of_prompt: the same of the prompt's tokens but the first, where they were asked for.
    """

    prompt: Prompt
    tokens: Prompt
    likeliest: list[Likeliest]
    of_prompt: list[Likeliest]


@dataclass
class Heard:
    """Listens to what clients of an engine are told, also those that go away.

    Attributes:
        answers: by name of the request, as they stand.
    """

    served: Engine
    answers: dict[str, Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        step = self.served.llm.llm_engine.step

        def stepped() -> Any:
            outputs = step()
            for output in outputs:
                tokens, likeliest = output.outputs[0].token_ids, output.outputs[0].logprobs
                self.answers[output.request_id] = Answer(
                    list(output.prompt_token_ids),
                    list(tokens),
                    [_likeliest(each) for each in likeliest or ()],
                    [_likeliest(each) for each in (output.prompt_logprobs or ())[1:]],
                )
            return outputs

        self.served.llm.llm_engine.step = stepped


def _likeliest(logprobs: dict[int, Any]) -> Likeliest:
    return {token: one.logprob for token, one in logprobs.items()}


class AnyTraffic(Traffic):
    """Random requests whose text recurs: at equal positions, shifted, in other orders, repeated, cut, continued.

    Args:
        longest: tokens of a prompt at the most.
    """

    def __init__(self, served: Engine, seed: int, priorities: bool = False, longest: int = LONGEST) -> None:
        super().__init__(served, seed, priorities)
        self.prompts: list[Prompt] = []
        self.answers = Heard(served).answers
        self._longest = longest
        self._texts = [text(320, 1000 * seed + number) for number in range(3)]

    def ask(self) -> None:
        """Now and then several at once, of which later ones may follow the first; nothing while many wait."""
        if len(self.alive) > CROWD:
            self.served.step()
            return
        for _ in range(self.rng.choice([1, 1, 1, 1, 1, 4])):
            self._ask()

    def reset(self, running: bool) -> None:
        """Now and then: what was reused is reused again, and what was written is written to others."""
        if self.rng.random() < 0.3:
            super().reset(running)

    def _ask(self) -> None:
        rng = self.rng
        prompt = self._prompt()[: self._longest]
        options: dict[str, Any] = {"salt": rng.choice([None, None, None, "red"])}
        options.update(rng.choice([{}] * 10 + [{"extra": {"jointkv": False}}, {"prompt_logprobs": LIKELIEST}]))
        if self.priorities:
            options["priority"] = rng.randrange(3)
        out = rng.choice([1, 2, rng.randrange(1, 12), rng.randrange(1, 12), 2 * BLOCK + 3])
        name = self.served.submit(prompt, out, logprobs=LIKELIEST, **options)
        self.prompts.append(prompt)
        self.alive.append(name)
        self.asked[name] = out

    def _prompt(self) -> Prompt:
        rng = self.rng
        kind = rng.random()
        if kind < 0.2 and self.prompts:
            return self._again(rng.choice(self.prompts[-20:]))
        if kind < 0.3 and self.answers:
            said = rng.choice(list(islice(reversed(self.answers.values()), 20)))
            return said.prompt + said.tokens + self._own(40)
        runs = rng.choice([1, 1, 1, 2, 3])
        parts = [self._head()] + [part for _ in range(runs) for part in (self._run(), self._own(rng.choice([0, 40])))]
        return [token for part in parts for token in part] + self._own(40) or [11]

    def _again(self, prompt: Prompt) -> Prompt:
        """As it was, up to some place, a block's border or one beside that, or with one token changed."""
        rng = self.rng
        cut = rng.choice([len(prompt), rng.randrange(1, len(prompt) + 1), self._near_border(len(prompt))])
        prompt = prompt[: max(cut, 1)]
        if rng.random() < 0.3:
            prompt = prompt.copy()
            prompt[rng.randrange(len(prompt))] = rng.randrange(10, VOCABULARY)
        return prompt + self._own(rng.choice([0, 40]))

    def _head(self) -> Prompt:
        """What stands before the first run."""
        rng = self.rng
        odd = rng.choice([0, 1, BLOCK - 1, BLOCK + 1, 2 * BLOCK, rng.randrange(80)])
        return text(rng.choice([BLOCK, odd]), rng.randrange(40))

    def _run(self) -> Prompt:
        """A part of one of the texts."""
        rng, whole = self.rng, self.rng.choice(self._texts)
        first = rng.choice([0, 0, 0, 0, rng.randrange(100), self._near_border(100)])
        return whole[first : first + rng.choice([len(whole), rng.randrange(40, 300), self._near_border(300)])]

    def _own(self, most: int) -> Prompt:
        return text(self.rng.randrange(most + 1), self.rng.randrange(10**6))

    def _near_border(self, most: int) -> int:
        return max(BLOCK * self.rng.randrange(most // BLOCK + 1) + self.rng.choice([-1, 0, 1]), 0)


def play(served: Engine, events: int, seed: int, **options: Any) -> dict[str, Answer]:
    """Answers to random traffic, each of which that was not aborted has all its tokens.

    Args:
        options: of `AnyTraffic`.
    """
    served.side.reuse.look_up.draw = random.Random(seed).random
    traffic = AnyTraffic(served, seed, **options)
    traffic.run(events)
    while served.pages_in_use:  # a store loads and writes still
        served.step()
    served.assert_drained()
    assert served.statistics["faults"] == served.statistics["store_faults"] == 0, served.side.recovery.cause
    assert all(len(served.outputs[name]) == out for name, out in traffic.asked.items() if name in served.outputs)
    return dict(traffic.answers)


def differences(model: Path, answers: dict[str, Answer], **options: Any) -> dict[str, float]:
    """By how much log-probabilities are others than those of stock vLLM, by request.

    Stock vLLM reads every prompt with its answer in one piece, and says what it thinks of each token.

    Args:
        options: of the stock engine.
    """
    with engine(model, 500, **options) as stock:
        heard = Heard(stock).answers
        names = {
            name: stock.submit(each.prompt + each.tokens, 1, prompt_logprobs=LIKELIEST)
            for name, each in answers.items()
        }
        stock.finish()
        return {name: farthest(answers[name], heard[other].of_prompt) for name, other in names.items()}


def farthest(answer: Answer, read: Sequence[Likeliest]) -> float:
    """By how much any log-probability of `answer` is another than where prompt and answer were `read` in one piece.

    Where two tokens are next to equally likely either may come first, so each is compared by itself where both say
    something of it, and the likeliest in their order.
    """
    before = len(answer.prompt) - 1
    pairs = list(zip(answer.likeliest, read[before:], strict=True)) + list(zip(answer.of_prompt, read, strict=False))
    return max((_far(ours, theirs) for ours, theirs in pairs), default=0.0)


def _far(ours: Likeliest, theirs: Likeliest) -> float:
    same = [abs(ours[token] - theirs[token]) for token in ours.keys() & theirs.keys()]
    ranked = (sorted(each.values(), reverse=True)[:LIKELIEST] for each in (ours, theirs))
    return max(*same, *(abs(one - other) for one, other in zip(*ranked, strict=True)), 0.0)
