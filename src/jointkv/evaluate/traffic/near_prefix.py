"""Near-prefix traffic: a session line of fixed token length in front of text that is mostly shared."""

import random

from jointkv.errors import BadInput
from jointkv.evaluate.traffic.base import Tokenizer, encode
from jointkv.evaluate.traffic.four_shot import FourShotTraffic

# Tokenizers that merge digits give headers of a dozen lengths; enough draws make one length common enough.
_DRAWS_PER_REQUEST = 64


def session_line(session: int, rng: random.Random) -> str:
    """One line with the number of a session and a random date and time."""
    date = f"{rng.randrange(2020, 2030)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"
    time = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}:{rng.randrange(60):02d}"
    return f"Session {session:08d}, {date} {time}."


class NearPrefix(FourShotTraffic):
    """Requests that differ in the first block, then share four examples at equal positions."""

    name = "near_prefix"
    description = "random session line of fixed token length, the same four worked examples, own question"

    def headers(self, tokenizer: Tokenizer, shared: str, count: int, rng: random.Random) -> list[str]:
        """Lines of distinct sessions, behind which `shared` has the same tokens at the same positions."""
        by_alignment: dict[tuple[int, tuple[int, ...]], list[str]] = {}
        sessions: set[int] = set()
        for _ in range(_DRAWS_PER_REQUEST * count):
            session = rng.randrange(10**8)
            if session in sessions:
                continue
            sessions.add(session)
            header = session_line(session, rng)
            length = len(encode(tokenizer, header))
            tail = encode(tokenizer, header + shared)[length:]
            aligned = by_alignment.setdefault((length, tail), [])
            aligned.append(header)
            if len(aligned) == count:
                return aligned
        most = max(len(aligned) for aligned in by_alignment.values())
        raise BadInput(
            f"traffic {self.name!r} can make {most} session lines of one token length with this tokenizer, "
            f"{count} requested"
        )
