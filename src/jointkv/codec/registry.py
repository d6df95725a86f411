"""All codecs, and messages that name theirs in their first byte."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jointkv.codec.alone import Alone
from jointkv.codec.base import Aids, Codec
from jointkv.codec.difference import Difference
from jointkv.codec.exact import Exact
from jointkv.codec.fp8 import Float8
from jointkv.codec.int4 import Int4
from jointkv.codec.pages import Layout, Pages
from jointkv.codec.raw import Raw
from jointkv.codec.reference import Reference
from jointkv.errors import BadInput

CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (Raw(), Exact(), Reference(), Alone(), Difference(), Float8(), Int4())
}
_BY_NUMBER = {codec.number: codec for codec in CODECS.values()}

NEEDS_REFERENCE = frozenset(CODECS[name].number for name in ("reference", "difference"))
"""First bytes of messages that say nothing without a reference page."""


def get_codec(name: str) -> Codec:
    """The codec `name`. Raises BadInput for an unknown one."""
    if not isinstance(name, str) or name not in CODECS:
        raise BadInput(f"unknown codec {name!r}; there are {', '.join(CODECS)}")
    return CODECS[name]


def encode(codec: Codec, pages: Pages, aids: Aids) -> list[bytes]:
    """Messages of `pages`, one each, without a look at errors; see `jointkv.codec.choose`.

    Raises BadInput for something else than pages, or where aids are missing.
    """
    if not isinstance(pages, Pages):
        raise BadInput(f"pages are encoded, not {type(pages).__name__}")
    return [bytes([codec.number]) + payload for payload in codec.encode(pages, aids)]


def decode(messages: Sequence[bytes], layout: Layout, positions: Tensor, aids: Aids) -> Pages:
    """The pages of `messages`, whatever their codecs, at `positions [n]`.

    Raises:
        BadInput: malformed, of an unknown codec, or without what they need of `aids`.
        ModelMismatch: encoded with another transform.
    """
    if not isinstance(messages, Sequence) or not isinstance(positions, Tensor) or len(messages) != len(positions):
        raise BadInput("as many messages as positions are needed, the positions as a tensor")
    chosen: dict[int, list[int]] = {}
    for number, message in enumerate(messages):
        if not message or message[0] not in _BY_NUMBER:
            raise BadInput("a page of an unknown codec; a newer or an older jointkv may have written it")
        chosen.setdefault(message[0], []).append(number)
    if len(chosen) == 1:
        (code,) = chosen
        return _BY_NUMBER[code].decode([message[1:] for message in messages], layout, positions, aids)
    pages = Pages.empty(layout, positions)
    for code, numbers in chosen.items():
        index = torch.tensor(numbers)
        references = aids.references if code in NEEDS_REFERENCE else None
        mine = Aids(aids.transform, None if references is None else references.take(index))
        payloads = [messages[number][1:] for number in numbers]
        pages.put(numbers, _BY_NUMBER[code].decode(payloads, layout, positions[index], mine))
    return pages
