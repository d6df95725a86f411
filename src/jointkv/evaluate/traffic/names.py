"""Near-prefix traffic whose headers differ in length, so shared text starts at different positions."""

import random

from jointkv.evaluate.traffic.base import Tokenizer
from jointkv.evaluate.traffic.four_shot import FourShotTraffic

_FIRST = (
    *("Ada", "Bo", "Carlos", "Dmitri", "Eleanor", "Fatima", "Giulia", "Hiroshi", "Ingrid", "Jo", "Kwabena"),
    *("Lakshmi", "Maximiliane", "Ngozi", "Oluwaseun", "Priya", "Quentin", "Roxana", "Søren", "Tomasz"),
    *("Ulrike", "Valentina", "Wei", "Xiomara", "Yusuf", "Zsófia", "Annelise Charlotte", "Jean-Baptiste"),
)
_LAST = (
    *("Ng", "Smith", "von Hohenberg", "Okonkwo", "de la Cruz", "Li", "Abdurrahmanov", "Brown", "Lee"),
    *("Fernández Ortega", "Papadopoulos", "Kowalczyk", "van den Heuvel", "Subramanian", "Katz", "Wright"),
    *("Nakamura", "O'Connor", "Szczepański", "Mbeki", "Þórsdóttir", "Rossi", "Venkataraghavan"),
)


class Names(FourShotTraffic):
    """Requests that share text as in `NearPrefix`, shifted against each other by the length of a name."""

    name = "names"
    description = "a name of varying token length, the same four worked examples, own question"

    def headers(self, tokenizer: Tokenizer, shared: str, count: int, rng: random.Random) -> list[str]:
        """Lines with distinct full names; their token lengths are as various as the names."""
        names = [f"{first} {last}" for first in _FIRST for last in _LAST]
        return [f"You are helping {name} today." for name in rng.sample(names, count)]
