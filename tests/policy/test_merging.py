"""Merging on pair matrices gives the groups of the tree written out as a recursion over the blocks."""

import math

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jointkv.policy import FusionPolicy
from jointkv.policy.paper import merge_directions
from jointkv.policy.safe import merge_resident
from tests.fusion.strategies import Texture, make_case

MARGIN = 1e-3
"""Cosines nearer to a threshold, or to each other, than this may fall either way in float32."""


class DirectionTree:
    """Algorithm 1 as the paper writes it, on unit vectors in float64."""

    def __init__(self, keys, values, key_threshold, value_threshold):
        """`keys [n, layers, r]`; the layers of a group count equally, as one long vector."""
        self.keys, self.values = self.unit(keys), None if values is None else self.unit(values)
        self.key_threshold, self.value_threshold = key_threshold, value_threshold
        self.margin = math.inf
        self.groups = self.solve(0, 1 << max(0, len(keys) - 1).bit_length())

    @staticmethod
    def unit(blocks):
        return (blocks / np.linalg.norm(blocks, axis=2, keepdims=True)).reshape(len(blocks), -1)

    def solve(self, start, size):
        """The groups of blocks `start .. start + size - 1`, each a list that its leader begins."""
        if start >= len(self.keys):
            return []
        if size == 1:
            return [[start]]
        left = self.solve(start, size // 2)
        right = self.solve(start + size // 2, size // 2)
        joined, rest = [list(group) for group in left], []
        for group in right:
            best = self.most_similar(group, left)
            joined[best].extend(group) if best is not None else rest.append(group)
        return joined + rest

    def most_similar(self, group, others):
        found = []
        for number, other in enumerate(others):
            key = self.cosine(self.keys, group, other)
            open_pair = self.above(key, self.key_threshold)
            if self.values is not None:
                value = self.cosine(self.values, group, other)
                open_pair = self.above(value, self.value_threshold) and open_pair
            if open_pair:
                found.append((key, number))
        found.sort(key=lambda pair: -pair[0])
        if len(found) > 1:
            self.margin = min(self.margin, found[0][0] - found[1][0])
        return found[0][1] if found else None

    def above(self, cosine, threshold):
        self.margin = min(self.margin, abs(cosine - threshold))
        return cosine >= threshold

    @staticmethod
    def cosine(unit, group, other):
        first, second = unit[group].sum(0), unit[other].sum(0)
        return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))

    def leaders(self):
        leader = list(range(len(self.keys)))
        for group in self.groups:
            for block in group:
                leader[block] = group[0]
        return leader


def gram(blocks):
    """Mean cosines over the layers of `[n, layers, r]`."""
    unit = DirectionTree.unit(blocks) / math.sqrt(blocks.shape[1])
    return torch.tensor(unit @ unit.T, dtype=torch.float32)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**20),
    count=st.integers(1, 13),
    layers=st.integers(1, 3),
    size=st.integers(2, 6),
    key_threshold=st.floats(0.05, 0.95),
    value_threshold=st.none() | st.floats(-0.5, 0.8),
)
def test_directions_group_as_the_recursion_does(seed, count, layers, size, key_threshold, value_threshold):
    random = np.random.default_rng(seed)
    keys, values = random.standard_normal((2, count, layers, size))
    asked = values if value_threshold is not None else None
    tree = DirectionTree(keys, asked, key_threshold, value_threshold)
    assume(tree.margin > MARGIN)
    absent = torch.full((1, count), False)
    leader = merge_directions(
        torch.stack((gram(keys), gram(keys))),
        None if asked is None else torch.stack((gram(values), gram(values))),
        torch.cat((absent, ~absent)),
        key_threshold,
        value_threshold or 0.0,
    )
    assert leader[0].tolist() == list(range(count)), "blocks that are absent lead themselves"
    assert leader[1].tolist() == tree.leaders()


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**20),
    requests=st.integers(2, 11),
    clusters=st.integers(1, 4),
    layers=st.integers(1, 4),
    with_values=st.booleans(),
    turned=st.sets(st.integers(0, 10)),
)
def test_planned_groups_are_the_recursions(seed, requests, clusters, layers, with_values, turned):
    policy = FusionPolicy(
        representative="direction",
        similarity="key_value" if with_values else "key",
        key_threshold=0.9,
        value_threshold=0.8 if with_values else None,
        max_relative_error=None,
        max_token_error=None,
    )
    case = make_case(seed, policy, [1] * requests, Texture(clusters, noise=0.05, spread=0.3), layers=layers)
    for row in turned & set(range(requests)):  # values that agree with those of other turned ones only
        for layer in case.pool.kv.values:
            layer[case.page(row, 0)] = layer[case.page(row, 0)].roll(1, dims=-1)
    blocks = [case.read()[row, 0] for row in range(requests)]
    keys, values = (np.stack([block[side] for block in blocks]) for side in (0, 1))
    tree = DirectionTree(keys, values if with_values else None, 0.9, 0.8)
    assume(tree.margin > MARGIN)
    owner = {case.page(row, 0): row for row in range(requests)}
    (plan,) = case.plans()
    leader = list(range(requests))
    for row, page in zip(plan.row.tolist(), plan.page.tolist(), strict=True):
        leader[row] = owner[page]
    assert leader == tree.leaders()


def naive_resident(allowed, score, valid, start, size):
    """Who serves each of the blocks `start .. start + size - 1`.

    A right representative joins the left one that serves it best, with those of its members that may move; if
    any must stay, it stays with them.
    """
    if size == 1:
        return {start: start} if start < len(valid) else {}
    left = naive_resident(allowed, score, valid, start, size // 2)
    right = naive_resident(allowed, score, valid, start + size // 2, size // 2)
    served_by = {**left, **right}
    leaders = [block for block in left if left[block] == block and valid[block]]
    for old in [block for block in right if right[block] == block and valid[block]]:
        able = [new for new in leaders if allowed[old][new]]
        if not able:
            continue
        new = max(able, key=lambda block: (score[old][block], -block))
        members = [block for block in right if right[block] == old]
        staying = [block for block in members if not allowed[block][new]]
        for block in members:
            if block not in staying and not (block == old and staying):
                served_by[block] = new
    return served_by


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**20),
    positions=st.integers(1, 3),
    count=st.integers(1, 13),
    density=st.floats(0.1, 1.0),
    scores=st.integers(1, 50),
)
def test_residents_serve_as_the_recursion_says(seed, positions, count, density, scores):
    random = np.random.default_rng(seed)
    shape = (positions, count, count)
    allowed = random.random(shape) < density
    score = random.integers(0, scores, shape)
    valid = random.random((positions, count)) < 0.9
    found = merge_resident(
        torch.tensor(allowed), torch.tensor(score, dtype=torch.float32), torch.tensor(valid)
    ).tolist()
    size = 1 << max(0, count - 1).bit_length()
    for position, leaders in enumerate(found):
        ok = allowed[position] & valid[position][:, None] & valid[position]
        expected = naive_resident(ok.tolist(), score[position].tolist(), valid[position], 0, size)
        assert leaders == [expected[block] for block in range(count)]
        for block, leader in enumerate(leaders):
            assert leaders[leader] == leader, "a chain"
            assert leader == block or ok[block][leader]
