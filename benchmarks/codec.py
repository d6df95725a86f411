"""Bytes per token against KL of every codec, with real K and V: unrelated text, near-prefix requests, agent turns.

Ratios are against 16 bits per number. Transforms are fitted to other text than what is sent. KL is of the next-token
distributions of the true tokens behind a prompt, read from decoded pages, against the same model with what it computed.
`python benchmarks/codec.py --output docs/results/bench`; ten minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from jointkv.codec import CODECS, Aids, Bound, Chooser, Pages, Transform, decode, encode
from jointkv.codec.base import START_LEVEL, step_share
from jointkv.evaluate.score.fidelity import score
from jointkv.evaluate.traffic import get_traffic
from jointkv.evaluate.traffic.base import Request
from jointkv.evaluate.traffic.long_documents import LongDocuments
from jointkv.evaluate.traffic.near_prefix import session_line
from jointkv.evaluate.traffic.tool_dialogues import load_dialogues
from jointkv.hf.models import load_model
from jointkv.hf.stored import cache_of, fit_transform, pages_of, step_weights
from timing import write

MODEL, BLOCK, PROMPT, TRUE_TOKENS = "smollm2", 32, 512, 64
DTYPE = torch.bfloat16
FIT_TEXTS = 8
LEVELS = (11, 14, 16)
GOAL_KL = 1e-3
SETTINGS = ((Bound(0.1, 0.3), 14), (Bound(0.1, 0.3), 16), (Bound(0.2, 0.4), 16))
"""Of streams: the bound, and the level of the first try."""

PUBLISHED = {
    "CacheGen (arXiv 2310.07240)": "3.5 to 4.3 times smaller",
    "KVTC (arXiv 2511.01815)": "16 to 20 times, quality within a point",
    "vLLM turboquant": "3.8 times, GSM8K 0.90 to 0.84",
    "TokenDance": "11 to 17 times on agents, block-sparse differences",
}


@dataclass(frozen=True)
class Prompt:
    """One computed prompt: its pages, what follows it, and the model's logits there.

    Attributes:
        tail: prompt tokens behind the last whole block, and the true tokens.
        logits: over the true tokens, `[true, vocabulary]`.
    """

    tokens: Sequence[int]
    pages: Pages
    tail: list[int]
    true: list[int]
    logits: Tensor


class Bench:
    """The model, what it computed, and how far its answers move."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def prompt(self, request: Request) -> Prompt:
        tokens, true = list(request.prompt), list(request.continuation)
        cache = DynamicCache(config=self.model.config)
        logits = self.model(torch.tensor([[*tokens, *true]]), past_key_values=cache).logits[0]
        cache.crop(-len(true) - 1)  # the last token of a prompt is always computed
        pages = pages_of(cache, BLOCK, DTYPE)
        return Prompt(tokens, pages, tokens[len(pages) * BLOCK :], true, logits[len(tokens) - 1 : -1].clone())

    @torch.inference_mode()
    def kl(self, prompt: Prompt, decoded: Pages) -> float:
        """Mean over the true tokens."""
        inputs = torch.tensor([prompt.tail + prompt.true])
        logits = self.model(inputs, past_key_values=cache_of(self.model, decoded)).logits[0]
        logits = logits[len(prompt.tail) - 1 : -1]
        sums = score(logits[None], prompt.logits[None], [prompt.true])[0]
        return float(sums.kl / sums.positions)


def unrelated(bench: Bench, prompts: Sequence[Prompt], transform: Transform) -> list[dict[str, Any]]:
    """Every codec that needs no reference, over all of the text."""
    rows = []
    for name in ("raw", "fp8", "int4", "lossless"):
        rows.append(_row(bench, prompts, name, lambda pages, name=name: _plain(pages, name, Aids())))
    for level in LEVELS:
        aids = Aids(transform, level=level)
        row = _row(bench, prompts, "alone", lambda pages, aids=aids: _plain(pages, "alone", aids))
        rows.append(row | {"level": level, "step": round(step_share(level), 4)})
    return rows


def _plain(pages: Pages, name: str, aids: Aids) -> tuple[int, Pages]:
    messages = encode(CODECS[name], pages, aids)
    return sum(map(len, messages)), decode(messages, pages.layout, pages.positions, aids)


def _row(
    bench: Bench, prompts: Sequence[Prompt], name: str, work: Callable[[Pages], tuple[int, Pages]]
) -> dict[str, Any]:
    sent, numbers, kls, errors = 0, 0, [], []
    for prompt in prompts:
        nbytes, decoded = work(prompt.pages)
        sent += nbytes
        numbers += _numbers(prompt.pages)
        kls.append(bench.kl(prompt, decoded))
        errors.append([float(error.max()) for error in prompt.pages.errors(decoded)])
    key, value, token = np.array(errors).max(0).round(4).tolist()
    worst = {"key": key, "value": value, "token": token}
    return {"codec": name, "ratio": round(2 * numbers / sent, 3), "kl": mean(kls), "worst_error": worst}


def _numbers(pages: Pages) -> int:
    return len(pages) * (pages.layout.key_numbers + pages.layout.value_numbers)


def stream(bench: Bench, prompts: Sequence[Prompt], transform: Transform, bound: Bound, level: int) -> dict[str, Any]:
    """Requests one after the other to a receiver that keeps what it got; the first is not counted.

    A block whose tokens and all before it are there costs nothing; one whose own tokens are there has a reference.
    """
    chooser = Chooser(bound, transform, level)
    exact: dict[tuple[int, ...], Pages] = {}
    by_text: dict[tuple[int, ...], Pages] = {}
    sent, numbers, kls, codecs = 0, 0, [], Counter[str]()
    for number, prompt in enumerate(prompts):
        blocks = [tuple(prompt.tokens[: (i + 1) * BLOCK]) for i in range(len(prompt.pages))]
        decoded = Pages.empty(prompt.pages.layout, prompt.pages.positions)
        known = [i for i, block in enumerate(blocks) if block in exact]
        for i in known:
            decoded.put([i], exact[blocks[i]])
        new = [i for i in range(len(blocks)) if i not in known]
        references = [by_text.get(blocks[i][-BLOCK:]) for i in new]
        if new:
            encoded = chooser.encode(prompt.pages.take(torch.tensor(new)), *_given(references, prompt, new))
            decoded.put(new, encoded.decoded)
            for i, name in zip(new, encoded.codecs, strict=True):
                exact[blocks[i]] = decoded.take(torch.tensor([i]))
                if name not in ("reference", "difference"):
                    by_text.setdefault(blocks[i][-BLOCK:], exact[blocks[i]])
        if number:
            sent += sum(map(len, encoded.messages)) if new else 0
            sent += 32 * len(blocks)  # the address of each
            numbers += _numbers(prompt.pages)
            codecs.update(encoded.codecs if new else [])
            codecs["prefix"] += len(known)
            kls.append(bench.kl(prompt, decoded))
    made = {"bound": bound.block, "token_bound": bound.token, "level": level, "codecs": dict(codecs)}
    return {**made, "ratio": round(2 * numbers / sent, 2), "kl": mean(kls), "worst_request_kl": max(kls)}


def _given(
    references: Sequence[Pages | None], prompt: Prompt, new: Sequence[int]
) -> tuple[Pages | None, Tensor | None]:
    has = torch.tensor([reference is not None for reference in references])
    if not has.any():
        return None, None
    filled = [
        r if r is not None else prompt.pages.take(torch.tensor([i])) for r, i in zip(references, new, strict=True)
    ]
    joined = (torch.cat([getattr(page, side) for page in filled], 1) for side in ("keys", "values"))
    return Pages(*joined, torch.cat([page.positions for page in filled])), has


def agent_turns(tokenizer: Any, dialogues: int) -> list[Request]:
    """Dialogues of one assistant, the whole history sent again at each turn behind a session line of its own."""
    draw, requests = random.Random(0), []
    chosen = [dialogue for dialogue in load_dialogues() if len(dialogue.split_points()) >= 3][:dialogues]
    for dialogue in chosen:
        for at in sorted(dialogue.split_points())[-3:]:
            history = "\n".join(f"{turn.speaker}: {turn.text}" for turn in dialogue.turns[:at])
            following = "\n".join(f"{turn.speaker}: {turn.text}" for turn in dialogue.turns[at:])
            head = f"System: {session_line(draw.randrange(10**8), draw)}\n{chosen[0].instructions}\n{history}\n"
            prompt, true = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (head, following))
            if len(true) >= 16:
                requests.append(Request(tuple(prompt), tuple(true[:32]), head))
    return requests


def at_kl(rows: Sequence[dict[str, Any]], goal: float = GOAL_KL) -> float | None:
    """The ratio at `goal`, between the measured points on logarithmic scales; None outside of them."""
    points = sorted((row["kl"], row["ratio"]) for row in rows)
    for (low, small), (high, large) in pairwise(points):
        if low <= goal <= high:
            share = math.log(goal / low) / math.log(high / low)
            return round(math.exp(math.log(small) * (1 - share) + math.log(large) * share), 2)
    return None


def best(rows: Sequence[dict[str, Any]], goal: float = GOAL_KL) -> float | None:
    """The largest ratio at no more than `goal`."""
    return max((row["ratio"] for row in rows if row["kl"] <= goal), default=None)


def texts(tokenizer: Any) -> tuple[list[Sequence[int]], list[Request]]:
    """Token ids to fit a transform to, and requests of other text."""
    other = [
        request.prompt
        for request in get_traffic("unrelated").requests(tokenizer, FIT_TEXTS, continuation_tokens=1, seed=1)
    ]
    documents = LongDocuments(tokens=PROMPT, kinds=("novel",)).requests(
        tokenizer, 7, continuation_tokens=TRUE_TOKENS, seed=0
    )
    return other + [request.prompt for request in documents[3:]], list(documents[:3])


def the_transform(
    model: PreTrainedModel, fit: Sequence[Sequence[int]], weigh_tokens: int, file: Path | None
) -> tuple[Transform, Transform]:
    """Without and with weights of the steps; what is fitted stays in `file` for another run."""
    if file is not None and file.exists():
        plain = Transform.load(file)
    else:
        plain = fit_transform(model, fit, BLOCK)
        if file is not None:
            plain.save(file)
    weights = step_weights(model, plain, [fit[0], *(text[:weigh_tokens] for text in fit[-2:])], BLOCK)
    return plain, plain.weighted(weights)


def measure_unrelated(
    bench: Bench, documents: Sequence[Request], plain: Transform, weighted: Transform
) -> dict[str, Any]:
    prompts = [bench.prompt(request) for request in documents]
    rows = unrelated(bench, prompts, weighted)
    aids = Aids(plain, level=START_LEVEL)
    unweighted = _row(bench, prompts, "alone", lambda pages: _plain(pages, "alone", aids))
    lossless = next(row["ratio"] for row in rows if row["codec"] == "lossless")
    ratio = at_kl([row for row in rows if row["codec"] == "alone"])
    headline = {"ratio_at_kl": ratio, "lossless_ratio": lossless}
    return {"headline": headline, "prompts": len(prompts), "rows": rows, "without_weights": unweighted}


def measure_streams(bench: Bench, tokenizer: Any, transform: Transform) -> dict[str, Any]:
    near = get_traffic("near_prefix").requests(tokenizer, 5, continuation_tokens=48, seed=0)
    streams = {}
    for name, requests in (("near_prefix", near), ("agent_turns", agent_turns(tokenizer, 2))):
        computed = [bench.prompt(request) for request in requests]
        streams[name] = [stream(bench, computed, transform, bound, level) for bound, level in SETTINGS]
    headline = {f"{name}_ratio": best(rows) for name, rows in streams.items()}
    return {"headline": headline, "streams": streams}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("unrelated", "streams"), action="append", help="both by default")
    parser.add_argument("--weigh-tokens", type=int, default=256, help="of each text that steps are weighed with")
    parser.add_argument("--transform", type=Path, help="file to keep the fitted transform in, between runs")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL, dtype="float32")
    bench = Bench(model)
    fit, documents = texts(tokenizer)
    plain, weighted = the_transform(model, fit, arguments.weigh_tokens, arguments.transform)
    about = {"kl": GOAL_KL, "model": MODEL, "block_size": BLOCK, "published": PUBLISHED}
    about["weigh_tokens"] = arguments.weigh_tokens
    about["fitted_tokens"] = sum(len(text) // BLOCK * BLOCK for text in fit)
    for part in arguments.part or ("unrelated", "streams"):
        if part == "unrelated":
            found = measure_unrelated(bench, documents, plain, weighted)
        else:
            found = measure_streams(bench, tokenizer, weighted)
        write(arguments.output, f"codec_{part}", found | about)


if __name__ == "__main__":
    main()
