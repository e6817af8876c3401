"""`Grid`: the ranks of a group in two dimensions; each dimension is a group of its own to this rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqpar.comm.group import Group
from seqpar.comm.objects import gather_objects, gather_tensors, largest
from seqpar.comm.transport import NO_OPERATION, Message, Operation, Pending, ReduceOp, Transport
from seqpar_kernels.integers import is_integer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, eq=False)
class Grid:
    """A group arranged as ring x ulysses. Make one with `Group.grid` or `Grid.of`.

    Ulysses ranks are neighbours, which belong on one node: the hybrid exchanges most among them. For the
    mesh, `ring` counts the rows of tiles and `ulysses` the columns: queries are gathered among the ulysses
    ranks and keys among the ring ranks.

    Both dimensions talk over the group of all, and count in its traffic; no process group is created.

    Args:
        group: all ranks.
        members: `members[i][j]` is the rank in `group` of ring index i and ulysses index j.
    """

    group: Group
    members: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_code", str([[*row] for row in self.members]))

    @property
    def code(self) -> str:
        """The members as JSON, for compiled code, whose ops take no objects; no field, as in `Layout`."""
        return self._code  # type: ignore[attr-defined]

    @staticmethod
    def of(mesh: DeviceMesh, group: Group | None = None) -> Grid:
        """The grid of a 2-D device mesh: dimensions named ring and ulysses, or in that order.

        Args:
            group: of exactly the ranks of the mesh; by default of all processes.

        Raises:
            ValueError: the mesh is not 2-D, or the group has other ranks than the mesh.
            RuntimeError: torch.distributed is not initialised.
        """
        if getattr(mesh, "ndim", None) != 2:
            raise ValueError(f"a grid needs a 2-D device mesh, got {mesh!r}")
        group = group or Group.of()
        names = mesh.mesh_dim_names or ()
        ranks = mesh.mesh.T if tuple(names) == ("ulysses", "ring") else mesh.mesh
        place = {rank: n for n, rank in enumerate(group.transport.global_ranks)}
        if sorted(place) != sorted(ranks.flatten().tolist()):
            raise ValueError(
                f"the group must have the {ranks.numel()} ranks of the mesh, got {group}; pass group= "
                "made of the flattened mesh"
            )
        return Grid(group, tuple(tuple(place[r] for r in row) for row in ranks.tolist()))

    @staticmethod
    def decoded(code: str, group: Group) -> Grid:
        """The grid of a `code`, of the ranks of a group."""
        return Grid(group, tuple(map(tuple, json.loads(code))))

    def index_of(self, rank: int) -> tuple[int, int]:
        """The ring index and the ulysses index of a rank of the group."""
        return next((i, row.index(rank)) for i, row in enumerate(self.members) if rank in row)

    @cached_property
    def ulysses(self) -> Group:
        """The ranks of this rank's ring index."""
        return _view(self.group, self.members[self.index_of(self.group.rank)[0]])

    @cached_property
    def ring(self) -> Group:
        """The ranks of this rank's ulysses index."""
        j = self.index_of(self.group.rank)[1]
        return _view(self.group, [row[j] for row in self.members])

    @property
    def shape(self) -> tuple[int, int]:
        """The sizes of the two dimensions: (ring, ulysses)."""
        return len(self.members), len(self.members[0])

    def __deepcopy__(self, memo: object) -> Grid:
        """Returns itself: a copied model talks to the same ranks."""
        return self

    def __repr__(self) -> str:
        ring, ulysses = self.shape
        return f"Grid(ring={ring}, ulysses={ulysses}, rank={self.group.rank})"


def grid(group: Group, *, ulysses: int | None = None, ring: int | None = None) -> Grid:
    """Arranges a group in two dimensions, see `Group.grid`."""
    for name, degree in (("ulysses", ulysses), ("ring", ring)):
        if degree is not None and not is_integer(degree):
            raise TypeError(f"{name} must be an integer, got {degree!r}")
    if ulysses is None and ring is None:
        raise ValueError("a grid needs ulysses=, ring= or both")
    if ulysses is None:
        ulysses = group.size // max(ring or 1, 1)
    if ring is None:
        ring = group.size // max(ulysses, 1)
    if ulysses < 1 or ring < 1 or ulysses * ring != group.size:
        raise ValueError(
            f"the degrees of a grid must multiply to the {group.size} ranks of the group, "
            f"got {ulysses=} {ring=}"
        )
    rows = (range(i * ulysses, (i + 1) * ulysses) for i in range(ring))
    return Grid(group, tuple(tuple(row) for row in rows))


def _view(group: Group, members: Sequence[int]) -> Group:
    # docs/design.md: a `Grid` is two views of one group
    view = _View(group.transport, tuple(members))
    return Group(view, group.traffic, group.calls.among(tuple(members)))


class _View:
    """The transport of some ranks of another, counted anew. Everything goes point to point."""

    def __init__(self, whole: Transport, members: tuple[int, ...]) -> None:
        self._whole, self._members = whole, members
        self.rank, self.size = members.index(whole.rank), len(members)

    @property
    def control_device(self) -> torch.device:
        return self._whole.control_device

    @property
    def global_ranks(self) -> list[int]:
        return [self._whole.global_ranks[m] for m in self._members]

    def check_device(self, device: torch.device) -> None:
        self._whole.check_device(device)

    def prepare(self, device: torch.device) -> None:
        self._whole.prepare(device)

    def exchange(
        self,
        primitive: str,
        sends: Sequence[Message],
        receives: Sequence[Message],
        operation: Operation = NO_OPERATION,
    ) -> Pending:
        sends = [(self._members[r], x) for r, x in sends]
        receives = [(self._members[r], x) for r, x in receives]
        return self._whole.exchange(primitive, sends, receives, operation)

    def all_reduce(self, x: Tensor, op: ReduceOp, operation: Operation) -> None:
        everyone = gather_tensors(self, "all_reduce", x, [x] * self.size, operation)
        stacked = torch.stack(everyone)
        x.copy_(stacked.sum(0, dtype=x.dtype) if op == "sum" else stacked.amax(0))

    def largest(self, x: Tensor, operation: Operation) -> Tensor:
        return largest(self, x, operation)

    def gather_objects(self, item: object) -> list[object]:
        return gather_objects(self, item)
