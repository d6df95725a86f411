"""A list of near-equal sentences behind a customer's name and day, which recur in it: text that its header changes."""

import random
from collections.abc import Iterator

from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, encode, split_request

_PEOPLE = ("Ms Hart", "Mr Lund", "Ms Adeyemi", "Mr Rossi", "Ms Chen", "Mr Novak", "Ms Silva", "Mr Weber", "Ms Dahl")
_SHOWN = ("steam engines", "vases and lamps", "ship models", "old maps", "pocket watches", "ovens", "dolls", "coins")
_CUSTOMERS = (
    *("Alice Smith", "Robert Jones", "Mina Okafor", "Wei Chen", "Lars Dahl", "Ana Silva", "Igor Novak", "Tom Hart"),
    *("Ruth Weber", "Omar Khan", "Lucia Rossi", "Per Lund", "Grace Adeyemi", "John Miller", "Emma Brown", "Raj Patel"),
)
_DAYS = ("Monday", "Tuesday", "Friday", "Sunday", "May 3", "June 9", "March 1", "July 7", "August 12", "April 30")
_REGIONS = ("north", "south", "west", "coast", "valley", "island")
MUSEUMS = ("railway", "glass", "sea", "paper", "clock", "bread", "toy", "salt", "wind", "coin", "silk", "radio")

_LIST_SEED = 1
_DRAWS_PER_REQUEST, _MOST_DRAWS = 40, 3_000


def customer_line(rng: random.Random) -> str:
    """A session with the name, day and region of a customer."""
    day, name, region = (rng.choice(parts) for parts in (_DAYS, _CUSTOMERS, _REGIONS))
    return f"Session {rng.randrange(1000, 10000)} opened on {day} for customer {name}. Region {region}."


def museum_line(name: str, rng: random.Random) -> str:
    """A sentence or two of facts about a museum, with numbers and a name."""
    return (
        f"The {name} museum opened in {rng.randrange(1900, 2000)}. It has {rng.randrange(8, 40)} rooms and shows "
        f"{rng.choice(_SHOWN)}. Tickets cost {rng.randrange(3, 20)} dollars. Its director is {rng.choice(_PEOPLE)}."
    )


class Museum(Traffic):
    """What reuse must refuse until it knows better: names and numbers of the header recur in the text."""

    name = "museum"
    description = (
        "a customer's name and day, the same list of near-equal sentences in which such names recur, own question"
    )

    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """Every seed has the same list; the header is of one token length, so that the list stands at one place."""
        facts = random.Random(_LIST_SEED)
        lines = {name: museum_line(name, facts) for name in MUSEUMS}
        shared = "\n" + "\n".join(lines.values())
        for header in self._headers(tokenizer, count, rng):
            asked = rng.choice(MUSEUMS)
            rest = MUSEUMS[MUSEUMS.index(asked) :] + MUSEUMS[: MUSEUMS.index(asked)]
            answer = " " + " ".join(lines[name] for name in rest)
            prompt = f"{header}{shared}\n\nQuestion: What do you know of the {asked} museum?\nAnswer:"
            request = split_request(tokenizer, prompt, answer, continuation_tokens)
            if request is not None:
                yield request

    def _headers(self, tokenizer: Tokenizer, count: int, rng: random.Random) -> list[str]:
        by_length: dict[int, dict[tuple[int, ...], str]] = {}
        for _ in range(min(_DRAWS_PER_REQUEST * count, _MOST_DRAWS)):
            header = customer_line(rng)
            tokens = encode(tokenizer, header)  # with few words of its own a tokenizer may not tell headers apart
            by_length.setdefault(len(tokens), {})[tokens] = header
        return list(max(by_length.values(), key=len).values())
