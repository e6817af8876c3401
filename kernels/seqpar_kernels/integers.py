"""`is_integer`: what counts as a number of things."""

from __future__ import annotations


def is_integer(value: object) -> bool:
    """Whether a value is an integer, which True and False are not here."""
    return isinstance(value, int) and not isinstance(value, bool)
