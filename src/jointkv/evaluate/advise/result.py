"""What advice on a log says, as JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jointkv.evaluate.record import Origin, Record


class Breaking(Record):
    """One kind of difference that breaks prefixes, at one place of the prompts.

    Attributes:
        kind: `number`, `id`, `uuid`, `clock`, `date`, `name`, `tools`, `order`, `thought`, `text` or `blocks`.
        says: the same in words, such as "a 12-digit number".
        token: where it begins, median; `first_token` and `last_token` are the extremes.
        requests: whose longest prefix it breaks.
        gain: tokens that exact prefix caching would find in addition, in these requests, if the advice were followed.
        gain_share: of all prompt tokens.
        anchor: what stands before it, with digits as `#`.
        ours, theirs: an example: what a request has there, and what the earlier one.
        place: of the example in the log.
        advice: what to do.
    """

    kind: str
    says: str
    token: int
    first_token: int
    last_token: int
    requests: int
    gain: int
    gain_share: float
    anchor: str
    ours: str
    theirs: str
    place: str
    advice: str


class Advice(Origin):
    """Prompt tokens of a log by what they would have cost, with a pool of `pool_tokens` that works as a prefix cache.

    Attributes:
        source: the log.
        model: whose tokenizer and chat template made tokens of it.
        tenants: isolation keys (`cache_salt`) in it.
        unusable: entries of which no request could be made; `reasons` are the first ones.
        without_tools: requests with tools that this model's chat template leaves out, so that they are not counted.
        tokens: of all prompts.
        exact_tokens: in whole blocks that exact prefix caching finds.
        same_tokens: in further blocks that are resident at the same position, behind another text.
        moved_tokens: in further blocks whose text is resident at another position.
        breaks: by gain, the largest first.
        other_gain: of breaks that are too rare to be listed.
        seconds: it took.
    """

    format: Literal["jointkv.advice/1"] = "jointkv.advice/1"
    source: str
    model: str
    block_size: int = Field(ge=1)
    pool_tokens: int
    requests: int
    tenants: int
    unusable: int
    reasons: list[str]
    without_tools: int
    tokens: int
    exact_tokens: int
    same_tokens: int
    moved_tokens: int
    breaks: list[Breaking]
    other_gain: int
    seconds: float

    def share(self, tokens: int) -> float:
        """`tokens` over all prompt tokens."""
        return tokens / self.tokens if self.tokens else 0.0

    @property
    def cautions(self) -> list[str]:
        """What to know before trusting the numbers."""
        found = []
        if self.unusable:
            entries = "1 entry" if self.unusable == 1 else f"{self.unusable:,} entries"
            found.append(f"{entries} could not be used: {'; '.join(self.reasons)}")
        if self.without_tools:
            found.append(
                f"the chat template of {self.model} leaves out the tools of {self.without_tools:,} requests, so that "
                "they are not counted: give the model that these requests are for"
            )
        return found

    @property
    def new_tokens(self) -> int:
        """What nothing finds: text that was not resident, first blocks of stretches, and what fills no block."""
        return self.tokens - self.exact_tokens - self.same_tokens - self.moved_tokens

    @property
    def gain(self) -> int:
        """Of all breaks."""
        return sum(each.gain for each in self.breaks) + self.other_gain
