"""Versions of one document: each has a paragraph of its own near the head, and all that follows has moved."""

import random
from collections.abc import Iterator

from jointkv.evaluate.samples import packaged
from jointkv.evaluate.traffic.base import Request, Tokenizer, Traffic, split_request

FIRST, LINES = 40, 90
"""Lines of the novel at which the document begins, and how many it has, at most: about 1,000 tokens."""

HEAD, TAIL = 4, 12
"""Lines before the inserted ones, and by how many a version may be shorter."""

INSERTED = range(2, 7)
"""Lines that a version may have of its own."""


class EditedDocument(Traffic):
    """The beginning of one chapter, with lines from elsewhere in the novel behind its first ones."""

    name = "edited_document"
    description = "one document, a paragraph of its own inserted near its head, read up to a line of its own"

    def draw(self, tokenizer: Tokenizer, count: int, continuation_tokens: int, rng: random.Random) -> Iterator[Request]:
        """No line is inserted twice. A continuation is what follows in the document."""
        lines = [line for line in packaged("novel_sample.txt").read_text(encoding="utf-8").split("\n") if line.strip()]
        document, others = lines[FIRST:], lines[FIRST + 2 * LINES :]
        while len(others) >= max(INSERTED):
            own = [others.pop(0) for _ in range(rng.choice(INSERTED))]
            end = LINES - rng.randrange(TAIL)
            prompt = "\n".join([*document[:HEAD], *own, *document[HEAD:end]])
            answer = "\n" + "\n".join(document[end : end + LINES // 3])
            request = split_request(tokenizer, prompt, answer, continuation_tokens)
            if request is not None:
                yield request
