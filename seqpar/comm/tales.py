"""`Tales`: what each process of a world tells the others of itself, through a store of torch.distributed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from seqpar.comm.waits import Wait


class Store(Protocol):
    """What is used of a store of torch.distributed."""

    def set(self, key: str, value: str) -> None:
        """Sets a value that all ranks can read."""

    def add(self, key: str, amount: int) -> int:
        """Adds to a counter, and gives it."""

    def check(self, keys: list[str]) -> bool:
        """Whether the keys have values."""

    def get(self, key: str) -> bytes:
        """The value of a key."""


@dataclass
class Heard:
    """What a rank told last, and at which beat of this rank it was heard first.

    Beats and not seconds, so that no time passes while a job is suspended.
    """

    tale: dict[str, Any]
    at: int


class Tales:
    """The tales of one process: how it is, and how others were when they told it.

    Args:
        store: that all ranks share. One thread alone uses it.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank, self._life = store, rank, 0
        self._heard: dict[int, Heard] = {}
        self.beat = 0

    @property
    def tellers(self) -> int:
        """How many ranks have been listened to."""
        return len(self._heard)

    def tell(self, tale: dict[str, Any]) -> None:
        """Tells the others how this rank is."""
        if not self._life:  # process groups may be made anew over one store
            self._life = self._store.add(f"seqpar/lives/{self._rank}", 1)
        self.beat += 1
        self._store.set(self._key(self._rank), json.dumps(tale | {"beat": self.beat}))

    def listen(self, rank: int) -> Heard:
        """What a rank told last; an empty tale if it has told nothing yet."""
        if not self._store.check([self._key(rank)]):
            return Heard({}, self.beat)
        tale, heard = json.loads(self._store.get(self._key(rank))), self._heard.get(rank)
        if heard is None or heard.tale["beat"] != tale["beat"]:
            heard = self._heard[rank] = Heard(tale, self.beat)
        return heard

    def doing(self, rank: int) -> str:
        """What a rank that is waited for does, in words, as far as it has told."""
        tale = self.listen(rank).tale
        if not tale:
            return f"rank {rank} has not begun"
        if tale["left"]:
            return f"rank {rank} has left"
        if tale["busy"] or not tale["waits"]:
            return f"rank {rank} is busy with something else"
        ranks, place, what, _ = tale["waits"][0]
        return str(Wait(rank, tuple(ranks), place, what))

    def _key(self, rank: int) -> str:
        return f"seqpar/where/{self._life}/{rank}"
