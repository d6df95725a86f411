"""What users hand over, made sure of at the door: further in, a wrong type shows as something else, or not at all."""

from __future__ import annotations

from typing import Any

from jointkv.errors import BadInput, JointKVError


def check_whole(name: str, value: Any, least: int = 1, error: type[JointKVError] = BadInput) -> None:
    """Raises `error`, which names `name`, unless `value` is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise error(f"{name}: {value!r} is not a whole number of at least {least}")


def is_number(value: Any) -> bool:
    """Whether `value` can be compared with a bound; True and False cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool)
