"""Every policy of the grid on every traffic, each traffic prefilled once for each block size."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from transformers import PreTrainedModel

from jointkv.evaluate.compare.policies import compare_policies
from jointkv.evaluate.frontier.grid import FrontierSettings, Series, all_series
from jointkv.evaluate.frontier.result import FrontierRow
from jointkv.evaluate.holding.prefilled import Prefilled, prefill
from jointkv.evaluate.progress import Report
from jointkv.evaluate.traffic import get_traffic
from jointkv.evaluate.traffic.base import Tokenizer, Traffic
from jointkv.policy import LayerGroups


def steps(settings: FrontierSettings) -> int:
    """How often `run_frontier` reports."""
    return len(settings.traffics) * len(settings.block_sizes) * len(list(all_series(settings)))


def run_frontier(
    model: PreTrainedModel, tokenizer: Tokenizer, settings: FrontierSettings, report: Report
) -> Iterator[FrontierRow]:
    """The rows, series by series; `report` gets one line before each series.

    Raises:
        BadInput: settings that make no sense, or a traffic that cannot be made.
        InvalidPolicy: groups that do not divide the model's layers.
    """
    settings.check()
    series = list(all_series(settings))
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    groups = {each: LayerGroups.of(each.policy(each.levels[0], "batch"), layers).count for each in series}
    drawn = {
        traffic: traffic.requests(tokenizer, settings.requests, continuation_tokens=settings.tokens, seed=settings.seed)
        for traffic in map(get_traffic, settings.traffics)
    }
    for (traffic, requests), size in product(drawn.items(), settings.block_sizes):
        batch = prefill(model, requests, block_size=size)
        for each, count in groups.items():
            kind = f"{each.candidates}, {each.serves}, {each.decides}, {count} groups"
            report(f"{traffic.name}, blocks of {size}: {kind}")
            yield from _rows(model, batch, traffic, each, count, settings.most_kl)


def _rows(
    model: PreTrainedModel, batch: Prefilled, traffic: Traffic, series: Series, groups: int, most_kl: float
) -> Iterator[FrontierRow]:
    """The series up to the first policy beyond `most_kl`, which is kept."""
    policies = {f"{level:g}": series.policy(level, traffic.scope) for level in series.levels}
    compared = compare_policies(model, batch, policies, traffic.name, lambda line: None)
    next(compared)  # the unfused batch
    for level, row in zip(series.levels, compared, strict=True):
        yield FrontierRow(
            **row.model_dump(),
            block_size=batch.block_size,
            candidates=series.candidates,
            serves=series.serves,
            decides=series.decides,
            layer_groups=groups,
            level=level,
        )
        if row.kl > most_kl:
            return
