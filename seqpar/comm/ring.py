"""The ring: every rank's block visits every other rank, and what it gathers there comes home.

`ring_pass` brings blocks round while their visitor computes; `RingSum` is its dual and sums what the
visited ranks have to add. The next hop is always in flight while the current one is worked on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from seqpar.comm.group import Group
from seqpar.comm.transport import Pending

Block = tuple[Tensor, ...]


def ring_pass(
    block: Block, group: Group, rows: Sequence[int], *, primitive: str = "ring_pass"
) -> Iterator[tuple[int, Block]]:
    """Yields (owner, block of that owner): this rank's own first, then rank - 1, rank - 2, ...

    Sends P - 1 times. A block must not be used once the next one is asked for, nor written to.

    Args:
        block: this rank's tensors, `[b sl ...]`.
        rows: sl of every rank.
    """
    block = tuple(x.contiguous() for x in block)
    for step in range(group.size):
        owner = (group.rank - step) % group.size
        is_last = step == group.size - 1
        incoming: Block = ()
        if not is_last:
            incoming = _like(block, rows[(owner - 1) % group.size])
            pending = _hop(group, primitive, block, incoming)
        yield owner, block
        if not is_last:
            pending.wait()
            block = incoming


class RingSum:
    """Sums, for each block, what every rank adds to it, at the rank that owns it.

    `add` is called once per owner in the order of `ring_pass`; the share for this rank's own block
    stays here, so partial sums hop P - 1 times. They arrive while the next share is computed.
    """

    def __init__(self, group: Group, rows: Sequence[int], *, primitive: str = "ring_sum") -> None:
        self._group, self._rows, self._primitive = group, rows, primitive
        self._own: Block = ()
        self._pending: Pending | None = None
        self._arriving: Block = ()

    def add(self, owner: int, share: Block) -> None:
        """Adds this rank's share for the owner's block and sends the sum on. Keeps the tensors."""
        if owner == self._group.rank:
            self._own = share
            return
        self._receive_into(share)
        self._arriving = _like(share, self._rows[(owner - 1) % self._group.size])
        self._pending = _hop(self._group, self._primitive, share, self._arriving)

    def home(self) -> Block:
        """This rank's own block, with the shares of all ranks."""
        self._receive_into(self._own)
        return self._own

    def _receive_into(self, share: Block) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            for total, partial in zip(share, self._arriving, strict=True):
                total.add_(partial)


def _hop(group: Group, primitive: str, outgoing: Block, incoming: Block) -> Pending:
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    return group.exchange(
        primitive, [(after, x) for x in outgoing], [(before, x) for x in incoming]
    )


def _like(block: Block, rows: int) -> Block:
    return tuple(x.new_empty(x.shape[0], rows, *x.shape[2:]) for x in block)
