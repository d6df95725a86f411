"""The paper's Table 2 and Figure 6: the chunk scope on LongBench, eight chunks of 512 tokens at several thresholds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from jointkv.errors import BadInput
from jointkv.evaluate import datasets
from jointkv.evaluate.compare.comparison import Outputs
from jointkv.evaluate.holding.held import FusedBatch
from jointkv.evaluate.paper.batch import label
from jointkv.evaluate.paper.setup import OFF, QUESTION_TOKENS, Outcome, PaperSettings, Setup, fidelity_of, policies
from jointkv.evaluate.tasks import Example, Task, get_task
from jointkv.evaluate.tasks.base import cut_prompt
from jointkv.evaluate.tasks.run import answer, end_tokens
from jointkv.evaluate.traffic.base import Request, Tokenizer


@dataclass(frozen=True)
class ChunkRow:
    """Documents of one data set under one policy, each fused within itself.

    Attributes:
        source, stand_in, threshold, ratio: as in `BatchRow`.
        prompt_tokens: tokens fused per document; its last `QUESTION_TOKENS` follow them unfused.
        scored_tokens: of those and the true answer, over all documents; see `Fidelity`.
        metric: LongBench's own of the data set; `score` is of answers cut to `document_answer_tokens`, in the mean.
    """

    dataset: str
    source: str
    stand_in: bool
    policy: str
    threshold: float | None
    documents: int
    prompt_tokens: int
    scored_tokens: int
    ratio: float
    ratio_fused_layers: float
    kl: float
    top1: float
    nll: float
    nll_unfused: float
    metric: str
    score: float
    score_unfused: float


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
    loaded = read.examples[0].loaded_from
    setup.report(f"{loaded.name}: prefill of {len(read.requests)} documents of {read.fused} tokens")
    batch = setup.prefill(read.requests, 1)
    ends = end_tokens(setup.model, setup.tokenizer)
    written: list[Sequence[str | int]] = []

    def write(held: FusedBatch) -> Outputs:
        held.feed(torch.tensor([example.request.prompt[read.fused : -1] for example in read.examples]))
        written.append(answer(held, read.examples, setup.tokenizer, ends))
        return ()

    def run(name: str, policy: object) -> tuple[Outcome, float]:
        setup.report(f"{loaded.name}: {name}")
        found = setup.outcome(batch, policy, write)  # type: ignore[arg-type]
        pairs = zip(written[-1], read.examples, strict=True)
        return found, fmean(read.task.score(given, example) for given, example in pairs)

    unfused, unfused_score = run("unfused", OFF)
    rows = []
    wanted = policies(setup.settings.chunk_thresholds, scope="chunk", chunk_tokens=setup.settings.chunk_tokens)
    for name, threshold, policy in wanted:
        found, score = run(label(name, threshold), policy)
        fidelity = fidelity_of(found.logits, unfused.logits, read.requests)
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
                ratio=found.pages_before / found.pages_after,
                ratio_fused_layers=found.ratio_fused_layers,
                kl=fidelity.kl,
                top1=fidelity.top1,
                nll=fidelity.nll,
                nll_unfused=fidelity.nll_reference,
                metric=read.task.metric,
                score=score,
                score_unfused=unfused_score,
            )
        )
    return rows
