"""A `Sharding` says who stores which part of the score matrix, and how ranks multiply with it.

Attention over a stored matrix is three kinds of product, forward and backward: `outer` of row and column
vectors makes a matrix, `times` column vectors makes row vectors, `transposed_times` row vectors makes
column vectors. A sharding says which of them moves what between ranks; nothing here knows a softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from seqpar.comm import (
    AllToAll,
    Group,
    RingSchedule,
    RingSum,
    all_gather,
    heads_to_rows,
    reduce_scatter,
    ring_pass,
    rows_to_heads,
)
from seqpar.layout import Layout, split_heads
from seqpar_kernels import accumulation_dtype, dense
from seqpar_kernels.transfer import on_device


@dataclass(frozen=True, eq=False)
class Sharding:
    """A part of a matrix `[b hq i j]` for each rank. Here it is all of it, on a rank that is alone.

    Row vectors `[b sl hq w]` and column vectors `[b slk hkv w]` are this rank's own; `of_rows` and
    `of_cols` make of them what products take. A statistic of rows is `[b sl hq]` at their owners and
    `[b hq i]` where the matrix is. All ranks must call every method.
    """

    group: Group
    rows: Layout
    cols: Layout

    def positions(self) -> tuple[Int[Tensor, "i"], Int[Tensor, "j"]]:
        """The positions of the rows and of the columns that are here, in the order they are in."""
        return torch.arange(self.rows.length), torch.arange(self.cols.length)

    def of_rows(self, y: Float[Tensor, "b sl hq w"]) -> Tensor:
        """Row vectors as products take them."""
        return y

    def of_cols(self, z: Float[Tensor, "b slk hkv w"]) -> Tensor:
        """Column vectors as products take them."""
        return z

    def for_keys(self) -> Sharding:
        """The sharding that multiplies with the keys, as forward and backward both do."""
        return self

    def outer(self, y: Tensor, z: Tensor, cells: dense.Cells) -> Float[Tensor, "b hq i j"]:
        """The part of y z^T that belongs here, in float32 or wider."""
        return dense.outer(y, z, cells)

    def times(
        self,
        x: Tensor,
        z: Tensor,
        shape: torch.Size,  # noqa: ARG002
        cells: dense.Cells,
    ) -> Float[Tensor, "b sl hq w"]:
        """This rank's own rows of X z, of this shape."""
        return dense.times(x, z, cells)

    def transposed_times(
        self, x: Tensor, y: Tensor, shape: torch.Size, cells: dense.Cells
    ) -> Float[Tensor, "b slk hkv w"]:
        """This rank's own rows of X^T y, of this shape."""
        return dense.transposed_times(x, y, shape[2], cells)

    def spread(self, t: Float[Tensor, "b sl hq"]) -> Float[Tensor, "b hq i"]:
        """A statistic of rows, from their owners to where the matrix is."""
        return t.transpose(1, 2)

    def own(self, t: Float[Tensor, "b hq i"]) -> Float[Tensor, "b sl hq"]:
        """A statistic of whole rows, for the rows that this rank owns."""
        return t.transpose(1, 2)

    def share(self, t: Shaped[Tensor, "*w i"]) -> Shaped[Tensor, "*w n"]:
        """The part of what rows have here, such as a statistic, that no other rank counts too."""
        return t

    def combine_(self, tops: Float[Tensor, "b hq i"], sums: Float[Tensor, "b hq i"]) -> None:
        """Makes maxima and sums of the columns here those of all columns, in place."""

    def in_order(self, x: Float[Tensor, "b hq i j"]) -> Float[Tensor, "b hq i j"]:
        """The matrix with those of its dims that are whole in the order of positions."""
        return x


class Gathered(Sharding):
    """Each rank has its own rows, whole; column vectors, little beside the matrix, are gathered and kept."""

    def of_cols(self, z: Tensor) -> Tensor:
        """All columns, as the ranks hold them, one after another."""
        return all_gather(z, self.group, self.cols.rows, dim=1)


class ByRows(Sharding):
    """Each rank has its own rows, whole; column vectors travel round the ring, and sums come home by it."""

    def for_keys(self) -> Sharding:
        """The sharding that gathers keys, since both directions need them."""
        return Gathered(self.group, self.rows, self.cols)

    def positions(self) -> tuple[Tensor, Tensor]:
        """The positions of own rows, and of the columns as the ranks hold them, one after another."""
        return self.rows.positions(self.group.rank), self.cols.permutation()

    def outer(self, y: Tensor, z: Tensor, cells: dense.Cells) -> Tensor:
        """Computes one block of columns at a time."""
        b, i, hq, _ = y.shape
        x = y.new_empty(b, hq, i, self.cols.length, dtype=accumulation_dtype(y.dtype))
        for cols, z_o in self._visits(z):
            x[..., cols] = dense.outer(y, z_o, cells.columns(cols))
        return x

    def times(self, x: Tensor, z: Tensor, shape: torch.Size, cells: dense.Cells) -> Tensor:
        """Sums what the blocks of columns give."""
        total = x.new_zeros(shape)
        for cols, z_o in self._visits(z):
            total += dense.times(x[..., cols], z_o, cells.columns(cols))
        return total

    def transposed_times(
        self, x: Tensor, y: Tensor, shape: torch.Size, cells: dense.Cells
    ) -> Tensor:
        """One block of columns at a time."""
        # Of this tensor only shape, type and device are read.
        sums = RingSum((x.new_empty(shape),), self._schedule, self.group)
        for step in range(self.group.size):
            cols = self._place(self._schedule.owner_at(step))
            with sums.share() as share:
                assert share is not None, "every block is wanted"
                assert sums.begins, "the owner adds what arrives"
                share[0].copy_(
                    dense.transposed_times(x[..., cols], y, shape[2], cells.columns(cols))
                )
        return sums.home()[0]

    def in_order(self, x: Tensor) -> Tensor:
        """Puts the columns, which are whole, in order."""
        return x.index_select(-1, on_device(self.cols.inverse(), x.device))

    @property
    def _schedule(self) -> RingSchedule:
        return RingSchedule(self.group.rank, self.cols.rows)

    def _visits(self, z: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields (columns, column vectors) of every rank."""
        for owner, block in ring_pass((z,), self._schedule, self.group):
            assert block is not None, "every block is wanted"
            yield self._place(owner), block[0]

    def _place(self, owner: int) -> slice:
        start = sum(self.cols.rows[:owner])
        return slice(start, start + self.cols.rows[owner])


class ByColumns(Sharding):
    """Each rank has its own columns, whole; row vectors are gathered, sums for them reduce-scattered."""

    def positions(self) -> tuple[Tensor, Tensor]:
        """The positions of the rows as the ranks hold them, one after another, and of own columns."""
        return self.rows.permutation(), self.cols.positions(self.group.rank)

    def of_rows(self, y: Tensor) -> Tensor:
        """Gathers all row vectors."""
        return all_gather(y, self.group, self.rows.rows, dim=1)

    def times(self, x: Tensor, z: Tensor, shape: torch.Size, cells: dense.Cells) -> Tensor:  # noqa: ARG002
        """Sums over ranks what their columns give."""
        return reduce_scatter(dense.times(x, z, cells), self.group, self.rows.rows, dim=1)

    def spread(self, t: Tensor) -> Tensor:
        """Gathers the statistic of all rows."""
        return all_gather(t, self.group, self.rows.rows, dim=1).transpose(1, 2)

    def own(self, t: Tensor) -> Tensor:
        """Takes own rows out: every rank has the statistic of all."""
        start = sum(self.rows.rows[: self.group.rank])
        return t.narrow(2, start, self.rows.rows[self.group.rank]).transpose(1, 2)

    def combine_(self, tops: Tensor, sums: Tensor) -> None:
        """Combines the maxima first, then the sums of exponentials relative to them."""
        before = tops.clone()
        self.group.all_reduce_(tops, "max")
        # A row that sees nothing has the maximum -inf, and -inf - (-inf) would be NaN.
        sums.mul_(torch.exp(before - torch.where(tops == -torch.inf, 0.0, tops)))
        self.group.all_reduce_(sums, "sum")

    def in_order(self, x: Tensor) -> Tensor:
        """Puts the rows, which are whole, in order."""
        return x.index_select(2, on_device(self.rows.inverse(), x.device))


class ByDepth(Sharding):
    """Every rank has the whole matrix, as the sum of what slices of the vectors' width give."""

    def of_rows(self, y: Tensor) -> Tensor:
        """Exchanges all of own rows for a slice of all rows."""
        return self._slice(y, self.rows)

    def of_cols(self, z: Tensor) -> Tensor:
        """Exchanges all of own columns for a slice of all columns."""
        return self._slice(z, self.cols)

    def outer(self, y: Tensor, z: Tensor, cells: dense.Cells) -> Tensor:
        """Sums what the slices give, on every rank."""
        x = dense.outer(y, z, cells)
        self.group.all_reduce_(x, "sum")
        return x

    def times(self, x: Tensor, z: Tensor, shape: torch.Size, cells: dense.Cells) -> Tensor:
        """Multiplies for a slice of all rows, and exchanges that for all slices of own rows."""
        return self._unslice(dense.times(x, z, cells).to(z.dtype), self.rows, shape[3])

    def transposed_times(
        self, x: Tensor, y: Tensor, shape: torch.Size, cells: dense.Cells
    ) -> Tensor:
        """Multiplies for a slice of all columns, and exchanges that for all slices of own columns."""
        return self._unslice(
            dense.transposed_times(x, y, shape[2], cells).to(y.dtype), self.cols, shape[3]
        )

    def spread(self, t: Tensor) -> Tensor:
        """Gathers the statistic of all rows."""
        gathered = all_gather(t, self.group, self.rows.rows, dim=1)
        return gathered.index_select(1, on_device(self.rows.inverse(), t.device)).transpose(1, 2)

    def own(self, t: Tensor) -> Tensor:
        """Takes own rows out: every rank has the statistic of all."""
        return self.share(t).transpose(1, 2)

    def share(self, t: Tensor) -> Tensor:
        """Takes own rows out, or every rank would count all."""
        return t.index_select(-1, on_device(self.rows.positions(self.group.rank), t.device))

    def _slice(self, x: Tensor, layout: Layout) -> Tensor:
        (y,) = rows_to_heads((x.transpose(2, 3),), self._all_to_all(layout, x.shape[3]))
        return y.transpose(2, 3)

    def _unslice(self, y: Tensor, layout: Layout, width: int) -> Tensor:
        (x,) = heads_to_rows((y.transpose(2, 3),), self._all_to_all(layout, width))
        return x.transpose(2, 3).contiguous()

    def _all_to_all(self, layout: Layout, width: int) -> AllToAll:
        """The all-to-all in which entries of a vector are dealt as Ulysses deals heads."""
        places = tuple(layout.places(rank) for rank in range(layout.size))
        return AllToAll(self.group, (places,), (slices(width, layout.size),), (width,), (None,))


def slices(width: int, size: int) -> tuple[tuple[int, int], ...]:
    """Deals the entries of a vector to ranks, as evenly as can be: (start, stop) of each."""
    return split_heads(width, 1, size).q
