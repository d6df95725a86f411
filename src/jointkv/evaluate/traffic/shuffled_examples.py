"""Near-prefix traffic whose worked examples come in random order, as some servers draw them per request."""

import random
from collections.abc import Sequence

from jointkv.evaluate.traffic.four_shot import EXAMPLE_ROWS
from jointkv.evaluate.traffic.near_prefix import NearPrefix


class ShuffledExamples(NearPrefix):
    """Requests as in `NearPrefix`, where only examples that start at the same token can be shared."""

    name = "shuffled_examples"
    description = "random session line of fixed token length, four worked examples in random order, own question"

    def example_rows(self, rng: random.Random) -> Sequence[int]:
        """The four rows in random order."""
        return rng.sample(EXAMPLE_ROWS, len(EXAMPLE_ROWS))
