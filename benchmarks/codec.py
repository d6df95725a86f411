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
from collections.abc import Sequence
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
from jointkv.store.names import text_of
from timing import write

MODEL, BLOCK, PROMPT, TRUE_TOKENS = "smollm2", 32, 512, 64
DTYPE = torch.bfloat16
FIT_TEXTS, FIT_DOCUMENTS = 8, 4
DOCUMENTS, NEAR_PREFIX, DIALOGUES = 3, 6, 3
"""How many are measured: stretches of a novel, requests, dialogues with up to three turns each."""

LEVELS = (11, 14, 16, 18)
GOAL_KL = 1e-3
PUBLISHED = [
    {"name": name, "low": low, "high": high, "quality": quality, "source": source}
    for name, low, high, quality, source in (
        ("CacheGen", 3.5, 4.3, "negligible loss, by its authors", "arXiv 2310.07240"),
        ("KVTC", 16.0, 20.0, "scores within a point", "arXiv 2511.01815"),
        ("turboquant", 3.8, 3.8, "GSM8K 0.90 to 0.84", "vLLM, --kv-cache-dtype turboquant"),
        ("TokenDance", 11.0, 17.0, "agents, block-sparse differences", "arXiv 2604.03143"),
    )
]


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


WIDE, NARROW = Bound(0.2, 0.4), Bound(0.1, 0.3)
SETTINGS = ((WIDE, 14), (WIDE, 16), (WIDE, 18), (WIDE, 20), (NARROW, 16), (NARROW, 18), (NARROW, 20))
"""Of streams: the bound, and the level of the first try."""


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


def unrelated(bench: Bench, prompts: Sequence[Prompt], transform: Transform, plain: Transform) -> list[dict[str, Any]]:
    """Every codec that needs no reference, over all of the text."""
    rows = [_row(bench, prompts, name, Aids()) for name in ("raw", "fp8", "int4", "lossless")]
    rows += [_row(bench, prompts, "alone", Aids(transform, level=level), _step(level)) for level in LEVELS]
    unweighted = _row(bench, prompts, "alone", Aids(plain, level=START_LEVEL), _step(START_LEVEL))
    return [*rows, unweighted | {"codec": "alone, all layers alike"}]


def _step(level: int) -> str:
    return f"step {step_share(level):.2g}"


def _row(bench: Bench, prompts: Sequence[Prompt], name: str, aids: Aids, setting: str = "") -> dict[str, Any]:
    sent, numbers, kls, errors = 0, 0, [], []
    for prompt in prompts:
        messages = encode(CODECS[name], prompt.pages, aids)
        decoded = decode(messages, prompt.pages.layout, prompt.pages.positions, aids)
        sent += sum(map(len, messages))
        numbers += _numbers(prompt.pages)
        kls.append(bench.kl(prompt, decoded))
        errors.append([float(error.max()) for error in prompt.pages.errors(decoded)])
    key, value, token = np.array(errors).max(0).round(4).tolist()
    about = {"traffic": "unrelated", "codec": name, "setting": setting}
    measured = {"ratio": round(2 * numbers / sent, 3), "kl": mean(kls), "worst_request_kl": max(kls)}
    return {**about, **measured, "worst_error": {"key": key, "value": value, "token": token}}


def _numbers(pages: Pages) -> int:
    return len(pages) * (pages.layout.key_numbers + pages.layout.value_numbers)


def stream(
    bench: Bench, traffic: str, prompts: Sequence[Prompt], transform: Transform, bound: Bound, level: int
) -> dict[str, Any]:
    """Requests one after the other to a receiver that keeps what it got; the first is not counted.

    A block whose tokens and all before it are there costs nothing. One like it may be there: see `text_of`.
    """
    chooser = Chooser(bound, transform, level)
    exact: dict[tuple[int, ...], Pages] = {}
    by_text: dict[tuple[int, ...], Pages] = {}
    sent, numbers, kls, counts = Counter[str](), 0, [], Counter[str]()
    for number, prompt in enumerate(prompts):
        blocks = [tuple(prompt.tokens[: (i + 1) * BLOCK]) for i in range(len(prompt.pages))]
        texts = [tuple(text_of(np.array(block[-BLOCK:]), len(block) == BLOCK).tolist()) for block in blocks]
        new = [i for i, block in enumerate(blocks) if block not in exact]
        decoded = Pages.empty(prompt.pages.layout, prompt.pages.positions)
        for i in set(range(len(blocks))) - set(new):
            decoded.put([i], exact[blocks[i]])
        references = [by_text.get(texts[i]) for i in new]
        encoded = chooser.encode(prompt.pages.take(torch.tensor(new)), *_given(references, prompt, new))
        decoded.put(new, encoded.decoded)
        for i, name in zip(new, encoded.codecs, strict=True):
            exact[blocks[i]] = decoded.take(torch.tensor([i]))
            if name not in ("reference", "difference"):
                by_text.setdefault(texts[i], exact[blocks[i]])
        if not number:
            continue
        for i, name, message in zip(new, encoded.codecs, encoded.messages, strict=True):
            kind = f"{name}, header" if i == 0 else name
            counts[kind] += 1
            sent[kind] += len(message)
        counts["prefix"] += len(blocks) - len(new)
        sent["addresses"] += 32 * len(blocks)
        numbers += _numbers(prompt.pages)
        kls.append(bench.kl(prompt, decoded))
    about = {"pages": dict(counts), "kilobytes": {kind: round(nbytes / 1e3, 1) for kind, nbytes in sent.items()}}
    ratio = round(2 * numbers / sent.total(), 2)
    measured = {"ratio": ratio, "kl": mean(kls), "worst_request_kl": max(kls)}
    setting = f"within {bound.block:g}, a token {bound.token:g}; {_step(level)}"
    return {"traffic": traffic, "codec": "chosen by page", "setting": setting, **measured, **about}


def _given(
    references: Sequence[Pages | None], prompt: Prompt, new: Sequence[int]
) -> tuple[Pages | None, Tensor | None]:
    has = torch.tensor([reference is not None for reference in references])
    if not has.any():
        return None, None
    own = [prompt.pages.take(torch.tensor([i])) for i in new]
    return Pages.joined([page if page is not None else mine for page, mine in zip(references, own, strict=True)]), has


def agent_turns(tokenizer: Any, dialogues: int, seed: int) -> list[Request]:
    """Dialogues of one assistant, the whole history sent again at each turn behind a session line of its own."""
    draw, requests = random.Random(seed), []
    chosen = draw.sample([dialogue for dialogue in load_dialogues() if len(dialogue.split_points()) >= 3], dialogues)
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


def texts(tokenizer: Any, seed: int) -> tuple[list[Sequence[int]], list[Request]]:
    """Token ids to fit a transform to, and requests of other text."""
    other = get_traffic("unrelated").requests(tokenizer, FIT_TEXTS, continuation_tokens=1, seed=1)
    novel = LongDocuments(tokens=PROMPT, kinds=("novel",))
    documents = novel.requests(tokenizer, DOCUMENTS + FIT_DOCUMENTS, continuation_tokens=TRUE_TOKENS, seed=seed)
    return [request.prompt for request in (*other, *documents[DOCUMENTS:])], list(documents[:DOCUMENTS])


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
    rows = unrelated(bench, prompts, weighted, plain)
    lossless = next(row["ratio"] for row in rows if row["codec"] == "lossless")
    ratio = at_kl([row for row in rows if row["codec"] == "alone"])
    return {"headline": {"ratio_at_kl": ratio, "lossless_ratio": lossless}, "prompts": len(prompts), "rows": rows}


def measure_streams(bench: Bench, tokenizer: Any, transform: Transform, seed: int) -> dict[str, Any]:
    near = get_traffic("near_prefix").requests(tokenizer, NEAR_PREFIX, continuation_tokens=48, seed=seed)
    rows, counted = [], {}
    for name, requests in (("near_prefix", near), ("agent_turns", agent_turns(tokenizer, DIALOGUES, seed))):
        computed = [bench.prompt(request) for request in requests]
        counted[name] = len(computed) - 1
        rows += [stream(bench, name, computed, transform, bound, level) for bound, level in SETTINGS]
    headline = {f"{name}_ratio": best([row for row in rows if row["traffic"] == name]) for name in counted}
    return {"headline": headline, "counted_requests": counted, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("unrelated", "streams"), action="append", help="both by default")
    parser.add_argument("--weigh-tokens", type=int, default=256, help="of each text that steps are weighed with")
    parser.add_argument("--seed", type=int, default=1, help="of the requests that are measured")
    parser.add_argument("--transform", type=Path, help="file to keep the fitted transform in, between runs")
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL, dtype="float32")
    bench = Bench(model)
    fit, documents = texts(tokenizer, arguments.seed)
    plain, weighted = the_transform(model, fit, arguments.weigh_tokens, arguments.transform)
    about = {"format": "jointkv.codec/1", "kl": GOAL_KL, "model": MODEL, "block_size": BLOCK, "published": PUBLISHED}
    about |= {"weigh_tokens": arguments.weigh_tokens, "seed": arguments.seed}
    about["fitted_tokens"] = sum(len(text) // BLOCK * BLOCK for text in fit)
    for part in arguments.part or ("unrelated", "streams"):
        if part == "unrelated":
            found = measure_unrelated(bench, documents, plain, weighted)
        else:
            found = measure_streams(bench, tokenizer, weighted, arguments.seed)
        write(arguments.output, f"codec_{part}", found | about)


if __name__ == "__main__":
    main()
