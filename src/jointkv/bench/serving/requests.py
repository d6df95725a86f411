"""Where the requests of a serving benchmark come from; whatever the source, they end as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingRequest:
    """One request as it is sent.

    Attributes:
        prompt: token ids.
        output_tokens: how many are generated, whatever end tokens come up.
        timestamp: seconds after the start of the log it was taken from; None where arrival is the load's business.
    """

    prompt: tuple[int, ...]
    output_tokens: int
    timestamp: float | None = None
