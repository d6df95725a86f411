"""The paper's Table 2 and Figure 6: the chunk scope on LongBench, eight chunks of 512 tokens at several thresholds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import fmean

import torch

from jointkv.errors import BadInput
from jointkv.evaluate import datasets
from jointkv.evaluate.holding.fused import OFF, FusedBatch
from jointkv.evaluate.paper.result import ChunkRow
from jointkv.evaluate.paper.setup import QUESTION_TOKENS, PaperSettings, Setup, compared, label, policies
from jointkv.evaluate.tasks import Example, Task, get_task
from jointkv.evaluate.tasks.base import cut_prompt
from jointkv.evaluate.tasks.run import answer, end_tokens
from jointkv.evaluate.traffic.base import Request, Tokenizer


@dataclass(frozen=True)
class Documents:
    """Long prompts of one data set, all of one length.

    Attributes:
        examples: whole prompts and right answers.
        requests: their first `fused + 1` tokens, and what truly follows: the question's end and the answer.
    """

    task: Task
    examples: list[Example]
    requests: list[Request]
    fused: int


def documents(name: str, tokenizer: Tokenizer, settings: PaperSettings) -> Documents:
    """Documents of LongBench's data set `name`: those that are long enough, cut in the middle as its authors do.

    Raises:
        BadInput: the data cannot be had, or too few of them are long enough.
    """
    task = get_task(f"longbench_{name}")
    loaded = datasets.LongBench(name).load()
    fused = settings.chunks * settings.chunk_tokens
    length, room = fused + QUESTION_TOKENS, fused + QUESTION_TOKENS + settings.document_answer_tokens
    examples, requests = [], []
    for row in random.Random(settings.seed).sample(loaded.rows, len(loaded.rows)):
        whole = cut_prompt(task, tokenizer, row.text, settings.document_answer_tokens, room)
        if len(whole.prompt) < length:
            continue
        space = "" if whole.text[-1].isspace() else " "
        follows = whole.prompt[fused + 1 :] + tuple(
            tokenizer(f"{space}{row.answers[0]}", add_special_tokens=False)["input_ids"]
        )
        examples.append(Example(whole, row.answers, loaded, max_new_tokens=settings.document_answer_tokens))
        requests.append(Request(whole.prompt[: fused + 1], follows, whole.text))
        if len(examples) == settings.documents:
            # One forward pass scores them all, so each is scored over as many tokens.
            shared = min(len(request.continuation) for request in requests)
            shared = min(shared, QUESTION_TOKENS - 1 + settings.answer_tokens)
            cut = [Request(each.prompt, each.continuation[:shared], each.text) for each in requests]
            return Documents(task, examples, cut, fused)
    raise BadInput(
        f"{loaded.name} ({loaded.source}) has {len(examples)} documents of {length} tokens; "
        f"{settings.documents} are needed"
    )


def run_chunks(setup: Setup, read: Documents) -> list[ChunkRow]:
    """The documents under all policies."""
    settings, loaded = setup.settings, read.examples[0].loaded_from
    setup.report(f"{loaded.name}: prefill of {len(read.requests)} documents of {read.fused} tokens")
    batch = setup.prefill(read.requests, 1)
    ends = end_tokens(setup.model, setup.tokenizer)

    def mean_score(held: FusedBatch) -> float:
        held.feed(torch.tensor([example.request.prompt[read.fused : -1] for example in read.examples]))
        pairs = zip(answer(held, read.examples, setup.tokenizer, ends), read.examples, strict=True)
        return fmean(read.task.score(given, example) for given, example in pairs)

    setup.report(f"{loaded.name}: unfused")
    _, reference, score_unfused = setup.outcome(batch, OFF, mean_score)
    rows = []
    for name, threshold, policy in policies(
        settings.chunk_thresholds, scope="chunk", chunk_tokens=settings.chunk_tokens
    ):
        setup.report(f"{loaded.name}: {label(name, threshold)}")
        held, logits, score = setup.outcome(batch, policy, mean_score)
        measured, fidelity = compared(held, logits, reference, read.requests)
        rows.append(
            ChunkRow(
                dataset=loaded.name,
                source=loaded.source,
                stand_in=loaded.stand_in,
                policy=name,
                threshold=threshold,
                documents=len(read.requests),
                prompt_tokens=read.fused,
                scored_tokens=fidelity.positions,
                metric=read.task.metric,
                score=score,
                score_unfused=score_unfused,
                **measured,
            )
        )
    return rows
