"""Requests whose middles are the same text at the same positions."""

import random

from jointkv.evaluate.traffic.base import Request

VOCABULARY, BLOCK = 97, 4


def requests(count, seed=0, shared=40, lengths=(50, 60)):
    """Requests with a head of their own, shared text at equal positions, and a tail of their own."""
    rng = random.Random(seed)
    draw = lambda n: [rng.randrange(2, VOCABULARY) for _ in range(n)]  # noqa: E731
    middle = [random.Random(99).randrange(2, VOCABULARY) for _ in range(shared)]
    made = []
    for _ in range(count):
        prompt = draw(4) + middle
        prompt += draw(rng.randrange(*lengths) - len(prompt))
        made.append(Request(tuple(prompt), tuple(draw(6)), ""))
    return made
