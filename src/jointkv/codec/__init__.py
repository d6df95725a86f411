"""Pages on their way to a disk or another machine: as they are, without loss, within a bound, or as a difference."""

from jointkv.codec.base import Aids, Codec
from jointkv.codec.choose import Bound, Chooser, Encoded
from jointkv.codec.pages import Errors, Layout, Pages
from jointkv.codec.registry import CODECS, decode, encode, get_codec
from jointkv.codec.transform import Transform

__all__ = [
    "CODECS",
    "Aids",
    "Bound",
    "Chooser",
    "Codec",
    "Encoded",
    "Errors",
    "Layout",
    "Pages",
    "Transform",
    "decode",
    "encode",
    "get_codec",
]
