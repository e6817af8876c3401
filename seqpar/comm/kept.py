"""`Kept`: schedules are made once for each kind of call, and used again by the next of that kind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
MOST = 32  # packed documents are others in every step


class Kept:
    """What was made of what; of many, those that were asked for last.

    A schedule says who meets whom and which rows go where. At 1024 ranks it takes longer to make than to use.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made under this key, or is made now.

        Args:
            key: all that the result depends on. It holds no tensors, which would live on with it.
        """
        with suppress(KeyError):  # also where another thread has dropped it in between
            found: T = self._made[key]
            self._made.move_to_end(key)
            return found
        found = self._made[key] = make()
        if len(self._made) > MOST:
            self._made.popitem(last=False)
        return found
