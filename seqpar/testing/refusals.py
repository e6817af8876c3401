"""What ranks are told where one of them, or all, make a call that must be refused.

What one rank would refuse, every rank refuses: soon, by a message to act on, and with nothing left on
the wire.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from seqpar.comm import DesyncError, Group

REFUSALS = ValueError, TypeError, NotImplementedError, DesyncError
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Refusal:
    """What one rank was told, how soon, and whether a correct call worked afterwards."""

    text: str
    seconds: float
    works_again: bool


def refusal(
    group: Group, call: Callable[..., Tensor], change: Mapping[str, Any], only: int | None = None
) -> Refusal:
    """Makes the changed call and then a correct one, on every rank of the group.

    Args:
        call: takes the group, and what is changed by keyword.
        only: the one rank whose call is changed; by default all are.
    """
    start = time.monotonic()
    text = told(lambda: call(group, **(change if only in (None, group.rank) else {})))
    seconds = time.monotonic() - start
    return Refusal(text, seconds, bool(call(group).isfinite().all()))


def told(act: Callable[[], object]) -> str:
    """The error that the function raises, as "ValueError: its message"; "nothing" if it returns."""
    try:
        act()
    except REFUSALS as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def check_refused(found: Iterable[Refusal], pattern: str) -> None:
    """Every rank was told what the pattern says, soon, and could go on.

    Raises:
        AssertionError: one was not.
    """
    for each in found:
        assert each.seconds < PATIENCE_SECONDS, each
        assert each.works_again, each
        check_told([each.text], pattern)


def check_told(texts: Iterable[str], pattern: str) -> None:
    """Every rank was told what the pattern says.

    Raises:
        AssertionError: one was not.
    """
    for text in texts:
        assert re.search(pattern, text), text
