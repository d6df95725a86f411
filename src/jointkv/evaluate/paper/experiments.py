"""The paper's experiments on a model at hand: growing batches, chunk scope, layers against the Poisson model."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jointkv.errors import BadInput
from jointkv.evaluate.paper.batch import growth, run_batch
from jointkv.evaluate.paper.chunks import documents, run_chunks
from jointkv.evaluate.paper.layers import run_layers
from jointkv.evaluate.paper.result import PaperRows
from jointkv.evaluate.paper.setup import PaperSettings, Setup, policies, sample
from jointkv.evaluate.progress import Report
from jointkv.system.nearest import not_known

PARTS = ("batch", "chunk", "layers")


def steps(settings: PaperSettings, parts: Collection[str] = PARTS) -> int:
    """How often `run_paper` reports. Raises `BadInput` for an unknown part."""
    _check_parts(parts)
    per_part = {
        "batch": len(settings.datasets) * (2 + len(settings.sizes) * (len(settings.thresholds) + 1)),
        "chunk": len(settings.tasks) * (3 + len(settings.chunk_thresholds)),
        "layers": 1 + len(settings.thresholds),
    }
    return sum(per_part[part] for part in parts)


def run_paper(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: PaperSettings,
    parts: Collection[str] = PARTS,
    progress: Report | None = None,
) -> PaperRows:
    """Run the experiments `parts`; all data is read before the model is.

    Raises:
        BadInput: unknown part, a data set that cannot be had or is too small, or prompts beyond the model's context.
        InvalidPolicy: a threshold that is no cosine.
    """
    _check_parts(parts)
    settings.check(model)
    policies((*settings.thresholds, *settings.chunk_thresholds))
    setup = Setup(model, tokenizer, settings, progress or (lambda line: None))
    needed = dict.fromkeys(settings.datasets if "batch" in parts else (), settings.largest)
    if "layers" in parts:
        # Its data set comes first, so that the batches can start from the same prefill.
        needed = {settings.layers_dataset: 0, **needed}
        needed[settings.layers_dataset] = max(needed[settings.layers_dataset], 2 * settings.layers_requests)
    samples = {name: sample(name, tokenizer, count, settings) for name, count in needed.items()}
    read = [documents(name, tokenizer, settings) for name in settings.tasks] if "chunk" in parts else []
    layers = run_layers(setup, samples[settings.layers_dataset]) if "layers" in parts else []
    batch = []
    if "batch" in parts:
        for name in sorted(settings.datasets, key=list(samples).index):
            batch += run_batch(setup, samples[name])
    chunk = [row for each in read for row in run_chunks(setup, each)]
    return PaperRows(batch=batch, growth=growth(batch), chunk=chunk, layers=layers)


def _check_parts(parts: Collection[str]) -> None:
    for part in parts:
        if part not in PARTS:
            raise BadInput(f"unknown part {not_known(part, PARTS)}")
