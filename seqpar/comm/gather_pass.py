"""Gathering in pieces, straight from their owners, and the dual: shares go straight home.

A chunk is a list of pieces of the ranks' rows. The next chunk is under way while one is worked on, so a
rank holds two chunks and never the whole sequence. A piece is sent to the ranks that want it only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, product
from typing import NamedTuple

from torch import Tensor

from seqpar.comm.group import Group
from seqpar.comm.packed_message import PackedMessage, Tensors
from seqpar.comm.transport import Pending


class Piece(NamedTuple):
    """Some of an owner's rows."""

    owner: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """The rows of the piece, counted among those of its owner."""
        return slice(self.start, self.stop)

    @property
    def length(self) -> int:
        """The number of rows."""
        return self.stop - self.start


Chunk = tuple[Piece, ...]


class Step(NamedTuple):
    """What one rank does for a chunk: once known, nothing is looked up in a call.

    Args:
        pieces: that it then holds, its own too, one after the other.
        rows: of all of them.
        own: where its own are among these rows.
        coming: the owners of the others, and where.
        sent: (to, piece) of its pieces, in the order of ranks.
    """

    pieces: Chunk
    rows: int
    own: list[tuple[Piece, slice]]
    coming: list[tuple[int, slice]]
    sent: list[tuple[int, Piece]]


@dataclass(frozen=True)
class GatherSchedule:
    """A table of the pieces that are due at each rank in each chunk, and of the ranks that want them.

    Args:
        rank, size: of this rank in the group.
        num_chunks: how many there are.
        due: the pieces of chunk n for this rank.
        taken: (rank, piece) of this rank's pieces that are due in chunk n, in the order of ranks.
        wants: (rank, piece), where the rank is not the owner; the same on every rank.
    """

    rank: int
    size: int
    num_chunks: int
    due: Callable[[int], Chunk]
    taken: Callable[[int], Iterable[tuple[int, Piece]]]
    wants: Callable[[int, Piece], bool] = field(default=lambda rank, piece: True)  # noqa: ARG005

    @staticmethod
    def in_turn(
        rank: int, blocks: Sequence[Chunk], wants: Callable[[int, Piece], bool]
    ) -> GatherSchedule:
        """The schedule in which chunk n of a rank is from the owner n ranks before it: all send at once.

        Pieces that follow on one another, and are wanted by one rank, are one piece of it and one message.

        Args:
            blocks: by owner, its pieces in the order of its rows.
        """
        size = len(blocks)

        def wanted(owner: int, visitor: int) -> Chunk:
            return _joined(p for p in blocks[owner] if owner == visitor or wants(visitor, p))

        def taken(n: int) -> Iterable[tuple[int, Piece]]:
            to = (rank + n) % size
            return ((to, p) for p in wanted(rank, to))

        return GatherSchedule(rank, size, size, lambda n: wanted((rank - n) % size, rank), taken)

    @staticmethod
    def together(
        rank: int, size: int, chunks: Sequence[Chunk], wants: Callable[[int, Piece], bool]
    ) -> GatherSchedule:
        """The schedule in which all ranks gather the same chunks, one after the other."""

        def taken(n: int) -> Iterable[tuple[int, Piece]]:
            own = [p for p in chunks[n] if p.owner == rank]
            return product(range(size), own) if own else ()

        return GatherSchedule(rank, size, len(chunks), lambda n: chunks[n], taken, wants)

    @cached_property
    def steps(self) -> list[Step]:
        """What this rank does for every chunk."""
        return [self._step(n) for n in range(self.num_chunks)]

    def _step(self, n: int) -> Step:
        # docs/design.md: no hop that nobody needs
        pieces = tuple(p for p in self.due(n) if p.owner == self.rank or self.wants(self.rank, p))
        ends = list(accumulate((p.length for p in pieces), initial=0))
        held = [(p, slice(a, b)) for p, a, b in zip(pieces, ends, ends[1:], strict=False)]
        return Step(
            pieces,
            ends[-1],
            [(p, at) for p, at in held if p.owner == self.rank],
            [(p.owner, at) for p, at in held if p.owner != self.rank],
            [(r, p) for r, p in self.taken(n) if r != self.rank and self.wants(r, p)],
        )


def _joined(pieces: Iterable[Piece]) -> Chunk:
    """The same rows of one owner in as few pieces as can be."""
    found: list[Piece] = []
    for p in pieces:
        if found and found[-1].stop == p.start:
            found[-1] = Piece(p.owner, found[-1].start, p.stop)
        else:
            found.append(p)
    return tuple(found)


def gather_pass(
    block: Tensors, schedule: GatherSchedule, group: Group, *, primitive: str = "gather"
) -> Iterator[tuple[Chunk, Tensors]]:
    """Yields (pieces, their rows one after the other) for every chunk, as far as this rank wants them.

    Args:
        block: this rank's tensors, `[b sl h w]` or `[b sl h]`, packed by `PackedMessage`.
    """
    message = PackedMessage.of(block)
    last = max((n for n, step in enumerate(schedule.steps) if step.sent), default=-1)
    # Own pieces as they are sent: where they are held, if they are.
    packed: dict[Piece, Tensors] = {}

    def start(n: int) -> tuple[Chunk, Tensors, Pending]:
        step = schedule.steps[n]
        chunk = message.empty(block[0], step.rows, block[0].shape[0], block[0].shape[2])
        for p, at in step.own:
            # Own rows of this chunk are packed where the chunk holds them, and sent from there.
            packed[p] = tuple(x[at] for x in chunk)
            for x, y in zip(message.unpack(packed[p]), block, strict=True):
                x.copy_(y[:, p.rows])
        for _, p in step.sent:
            if p not in packed:
                packed[p] = _part_of(packed, p) or message.pack([x[:, p.rows] for x in block])
        pending = group.exchange(
            primitive,
            [(rank, x) for rank, p in step.sent for x in packed[p]],
            [(owner, x[at]) for owner, at in step.coming for x in chunk],
        )
        # No later chunk sends anything of this rank's, so its packed rows need not live on.
        if n >= last:
            packed.clear()
        return step.pieces, chunk, pending

    coming = start(0) if schedule.num_chunks else None
    for n in range(schedule.num_chunks):
        assert coming is not None
        pieces, chunk, pending = coming
        pending.wait()
        # Begun before this chunk is handed out, so that it comes while the caller computes.
        coming = start(n + 1) if n + 1 < schedule.num_chunks else None
        yield pieces, message.unpack(chunk)


def _part_of(packed: Mapping[Piece, Tensors], piece: Piece) -> Tensors | None:
    """The rows of a piece, where they are packed as a part of another; `None` where they are not."""
    for whole, messages in packed.items():
        if whole.start <= piece.start and piece.stop <= whole.stop:
            rows = slice(piece.start - whole.start, piece.stop - whole.start)
            return tuple(x[rows] for x in messages)
    return None


class HomeSum:
    """Sums what ranks add to the pieces they hold, at the pieces' owners: the dual of `gather_pass`.

    For every chunk in turn, `with sums.share()` gives tensors to write, whole, and sends them home. Shares
    are added in the order of chunks and, in a chunk, of ranks, once the next chunk is done.

    Args:
        like: this rank's tensors that the sums are for; a sum has their shapes, all in the type of sums.
    """

    def __init__(
        self,
        like: Tensors,
        schedule: GatherSchedule,
        group: Group,
        *,
        primitive: str = "scatter",
    ) -> None:
        self._schedule, self._group, self._primitive = schedule, group, primitive
        self._message = PackedMessage.of(like).of_sums()
        self._like, (self._batch, rows, self._heads) = like[0], like[0].shape[:3]
        self._total = self._empty(rows).zero_()
        self._n = 0
        self._pending: Pending | None = None
        self._arriving: list[tuple[int, Piece, Tensor]] = []

    @contextmanager
    def share(self) -> Iterator[Tensors]:
        """Tensors for this rank's share of the chunk, with nothing in them; then they go to the owners."""
        share = self._empty(self._schedule.steps[self._n].rows)
        yield self._message.unpack((share,))
        self._land()
        self._pending, self._arriving = _start_home(
            share, self._schedule, self._n, self._group, self._primitive
        )
        self._n += 1

    def home(self) -> Tensors:
        """This rank's rows, with the shares of all ranks."""
        self._land()
        return self._message.unpack((self._total,))

    def _land(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        for _, p, x in self._arriving:
            self._total[p.rows] += x
        self._arriving = []

    def _empty(self, rows: int) -> Tensor:
        return self._message.empty(self._like, rows, self._batch, self._heads)[0]


def send_home(
    block: Tensors, schedule: GatherSchedule, group: Group, *, primitive: str = "scatter"
) -> list[tuple[Piece, Tensors]]:
    """Sends home what was gathered in one chunk; gives what each rank, in order, has for this rank's rows.

    Args:
        block: tensors `[b i h w]` or `[b i h]` of one dtype, of all rows that this rank has gathered.
    """
    message = PackedMessage.of(block)
    (share,) = message.pack(block)
    pending, arriving = _start_home(share, schedule, 0, group, primitive)
    pending.wait()
    return [(p, message.unpack((x,))) for _, p, x in arriving]


def _start_home(
    share: Tensor, schedule: GatherSchedule, n: int, group: Group, primitive: str
) -> tuple[Pending, list[tuple[int, Piece, Tensor]]]:
    """Sends the rows of a chunk home: (pending, [(from, piece, share)] in the order of ranks)."""
    step = schedule.steps[n]
    arriving = [(rank, p, share.new_empty(p.length, *share.shape[1:])) for rank, p in step.sent]
    pending = group.exchange(
        primitive,
        [(owner, share[at]) for owner, at in step.coming],
        [(rank, x) for rank, _, x in arriving],
    )
    arriving += [(group.rank, p, share[at]) for p, at in step.own]
    # Own shares take their turn among those of other ranks: the sum has one order everywhere.
    return pending, sorted(arriving, key=lambda a: a[0])
