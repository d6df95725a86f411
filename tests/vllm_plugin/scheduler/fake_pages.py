"""Pages that hold numbers instead of K and V: how they are written, compared, signed, filled and given directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jointkv.core.moved import Fills
from jointkv.policy import FusionPolicy
from jointkv.vllm_plugin.attention.norms import OwnNorms
from jointkv.vllm_plugin.messages import Inquiry, Verdict
from jointkv.vllm_plugin.worker.comparer import Comparison

LAYERS = 2
ANSWER = 900
"""Most generated tokens are `ANSWER` plus their position, so answers of different requests have equal text."""

FILLED = "text from elsewhere"
"""In the place of a request's name: who wrote a page."""

DIRECTION = "blocks of several requests"
"""Likewise."""

NO_TOKEN = -1
"""What a direction is written for."""

ALIKE = {"similarity": "key", "key_threshold": 0.8}
"""The options under which `gathered` says that blocks are alike."""

Block = tuple[int, ...]


class Model:
    """Stands for the weights: what is written for a token follows from all that is read before it.

    Attributes:
        version: other weights write other numbers.
    """

    def __init__(self) -> None:
        self.version = 0

    def extend(self, past: list[list[int]], tokens: Iterable[int]) -> None:
        """Append to `past` (numbers per layer group, token by token) what is written for `tokens`, in place.

        A layer group reads itself and those below it. However `tokens` are cut into chunks, the numbers are the same.
        """
        for token in tokens:
            read = [tuple(group) for group in past]
            for number, group in enumerate(past):
                group.append(hash((self.version, token, *read[: number + 1])))

    def sample(self, past: list[list[int]]) -> int:
        """The token after `past`."""
        number = hash(past[-1][-1])
        return ANSWER + len(past[-1]) + (1000 + number % 3 if number % 8 == 0 else 0)


class Pages:
    """What every page of the pool holds.

    Attributes:
        numbers: per page and token what stands for K and V.
        text: per page the position and the token that each number was written for.
        salts: of the requests that wrote the pages.
        writers: their names.
        versions: of the model that wrote them.
        generation: how often a page was begun.
        before_direction: called with a page and its members before their direction is written to it.
        compared: called with a page, the pages that hold what it was compared with, and the errors.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.numbers: list[list[int]] = [[0] * size for _ in range(count)]
        self.text: list[list[tuple[int, int]]] = [[(-1, -1)] * size for _ in range(count)]
        self.salts: list[str | None] = [None] * count
        self.writers: list[str | None] = [None] * count
        self.versions = [-1] * count
        self.generation = [0] * count
        self.before_direction: Callable[[int, list[int]], None] = lambda page, members: None
        self.compared: Callable[[int, set[int], tuple[float, ...]], None] = lambda own, others, errors: None

    def read(self, table: Sequence[int], count: int) -> list[int]:
        """The first `count` numbers behind `table`."""
        return [self.numbers[table[place // self.size]][place % self.size] for place in range(count)]

    def write(self, page: int, place: int, number: int, text: tuple[int, int], by: tuple[str, str | None, int]) -> None:
        """Write one token; `by` a request of that name and salt, with that version of the model."""
        if place == 0:
            self.generation[page] += 1
        self.numbers[page][place] = number
        self.text[page][place] = text
        self.writers[page], self.salts[page], self.versions[page] = by

    def moved(self, fills: Fills) -> Iterator[list[tuple[int, int, tuple[int, int]]]]:
        """Of blocks that are written from others: page, number and text at the new position of every token."""
        columns = (fills.first, fills.second, fills.offset, fills.shift)
        for first, second, offset, shift in zip(*(column.tolist() for column in columns), strict=True):
            places = [divmod(offset + place, self.size) for place in range(self.size)]
            tokens = [((second if behind else first), place) for behind, place in places]
            yield [
                (page, self.numbers[page][place], (self.text[page][place][0] + shift, self.text[page][place][1]))
                for page, place in tokens
            ]

    def block(self, page: int) -> Block:
        """All numbers of a page."""
        return tuple(self.numbers[page])


def errors(own: Block, other: Block) -> tuple[float, float, float]:
    """Relative errors of K, of V and of the worst token: 0 for equal numbers only, else up to 0.25, 0.25 and 0.36."""
    if own == other:
        return 0.0, 0.0, 0.0
    seed = hash((own, other)) & 0xFFFFFFFFFFFF
    key, value, token = ((1 + (seed >> shift) % 1000) / 1000 for shift in (0, 16, 32))
    return 0.25 * key, 0.25 * value, 0.36 * token


def within_bounds(own: Block, other: Block, policy: FusionPolicy) -> bool:
    """Whether `other` may serve a request that has computed `own`."""
    key, value, token = errors(own, other)
    block_bound, token_bound = policy.threshold("max_relative_error", 0), policy.threshold("max_token_error", 0)
    return max(key, value) <= block_bound and token <= token_bound  # type: ignore[operator]


def own_norm(own: Block, other: Block) -> float:
    """The factor with which a block that was `own` is to be read from `other`; 1 for one in eight, and equal ones."""
    return 1.0 if own == other else 0.5 + hash((other, own)) % 8 / 8


def gathered(blocks: Sequence[Block]) -> np.ndarray:
    """The cosines of K and of V of all pairs: two in three blocks are alike, a few hold no numbers."""
    numbers = np.array([hash(block) for block in blocks])
    alike = numbers % 3 < 2
    cosines = (alike[:, None] & alike | np.eye(len(blocks), dtype=bool)).astype(np.float32)
    cosines[numbers % 31 == 0] = cosines[:, numbers % 31 == 0] = np.nan
    return np.stack((cosines, cosines))


class Signer:
    """In the place of `PageSigner`: two in three blocks are alike, a few hold no numbers."""

    def __init__(self, groups: dict[int, Pages], size: int, *_: Any) -> None:
        self.groups, self.size = groups, size

    def sign(self, inquiry: Inquiry) -> np.ndarray:
        """The signatures of pages as they are now."""
        found = np.zeros((len(inquiry.sign), self.size), np.float16)
        for row, (group, page) in enumerate(zip(inquiry.sign_group.tolist(), inquiry.sign.tolist(), strict=True)):
            number = hash(self.groups[group].block(page))
            found[row, 0] = np.nan if number % 31 == 0 else (0.0, 0.1, 1.0)[number % 3]
        return found


class Filler:
    """In the place of `PageFiller`."""

    def __init__(self, pages: Pages, *_: Any) -> None:
        self.pages = pages

    def fill(self, targets: np.ndarray, fills: Fills) -> None:
        """Write blocks as they stand elsewhere, at their new positions."""
        pages = self.pages
        for target, tokens in zip(targets.tolist(), list(pages.moved(fills)), strict=True):
            sources = {page for page, _, _ in tokens}
            salts, versions = ({of[page] for page in sources} for of in (pages.salts, pages.versions))
            assert len(salts) == len(versions) == 1, "a page is written from texts of two keys or models"
            by = FILLED, salts.pop(), versions.pop()
            for place, (_, number, text) in enumerate(tokens):
                pages.write(target, place, number, text, by)


class Comparer:
    """In the place of `PageComparer`.

    Attributes:
        is_apart: as on a GPU, verdicts come one step late.
    """

    is_apart = False

    def __init__(
        self,
        across_layers: str,
        groups: dict[int, Pages],
        norms: OwnNorms | None,
        signer: Signer | None,
        filler: Filler | None,
    ) -> None:
        self.groups, self.norms, self.signer = groups, norms, signer

    def begin(self, inquiry: Inquiry) -> Comparison:
        """Compare the pairs of `inquiry`."""
        found, factors = [], []
        asked = inquiry.moved(np.arange(len(inquiry.group)))
        for pair, (group, own, other) in enumerate(np.stack((inquiry.group, inquiry.own, inquiry.other), 1).tolist()):
            pages = self.groups[group]
            assert pages.salts[own] == pages.salts[other], "pages of different salts are compared"
            block, others = pages.block(other), {other}
            if asked.shift[pair]:
                (tokens,) = pages.moved(asked.where(np.array([pair])))
                assert pages.text[own] == [text for _, _, text in tokens], "a block is compared with other text"
                block, others = tuple(number for _, number, _ in tokens), {page for page, _, _ in tokens}
            found.append((*errors(pages.block(own), block), 1.0, 1.0))
            pages.compared(own, others, found[-1][:3])
            factors.append(own_norm(pages.block(own), block))
        verdict = Verdict(inquiry.step, *np.array(found, np.float32).reshape(-1, 5).T)
        if self.signer is not None and len(inquiry.sign):
            verdict.signatures = self.signer.sign(inquiry)
        matrices = [gathered([self.groups[group].block(page) for page in held]) for group, held in inquiry.gathered]
        verdict.gathered = np.concatenate([np.zeros(0, np.float32), *(matrix.ravel() for matrix in matrices)])
        taken = verdict, torch.tensor(factors).reshape(-1, 1, 1).expand(-1, 1, 2)
        return Comparison(inquiry, [(np.ones(len(found), bool), lambda: taken)], 0.0)  # type: ignore[list-item, return-value]

    def finish(self, comparison: Comparison) -> Any:
        """The answer."""
        ((_, take),) = comparison.parts
        verdict, factors = take()
        if self.norms is not None:
            self.norms.propose(comparison.inquiry, factors)
        return verdict


class Reading:
    """In the place of `SharedReading`: the runner knows how blocks are read."""

    fault = in_place = None

    def __init__(self, block_size: int) -> None:
        self.block_size, self.counts = block_size, Counter[str]()


def share_reading(
    tables: Any, config: Any, groups: Sequence[int], settings: Any
) -> tuple[dict[int, Reading], OwnNorms | None]:
    """In the place of what changes the attention of layers; blocks keep their own norms where that is asked for."""
    norms = OwnNorms(1, tables.runner.vllm_config.max_concurrent_batches) if settings.own_norms else None
    return {number: Reading(config.kv_cache_groups[number].kv_cache_spec.block_size) for number in groups}, norms


def write_direction(pages: Pages, page: int, numbers: Tensor) -> None:
    """In the place of what writes tensors: blocks that are equal share themselves, others what follows from all."""
    members = numbers.tolist()
    pages.before_direction(page, members)
    salts, versions = ({of[member] for member in members} for of in (pages.salts, pages.versions))
    assert len(salts) == len(versions) == 1, "a direction is written for blocks of two keys or models"
    blocks, by = sorted({pages.block(member) for member in members}), (DIRECTION, salts.pop(), versions.pop())
    for place, (position, token) in enumerate(pages.text[members[0]]):
        equal = len(blocks) == 1
        number = blocks[0][place] if equal else hash((place, *blocks))
        pages.write(page, place, number, (position, token if equal else NO_TOKEN), by)


def packed_pages(layers: Sequence[Pages], num_blocks: int, block_size: int) -> Pages:
    """In the place of what reads tensors: all layers share one record of numbers."""
    return layers[0]
