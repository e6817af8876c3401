"""`group_of`, `grid_of`: what is made for some ranks takes a `Group`, or what torch has for them.

Only what is made once takes either; functions take the `Group`, as that of a module, `attend.group`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Union
from weakref import WeakKeyDictionary

from seqpar.comm.grid import Grid
from seqpar.comm.group import Group
from seqpar.comm.processes import process_group_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# The ranks of a group, and ranks in two dimensions.
Ranks = Union[Group, "ProcessGroup", "DeviceMesh"]
RanksOfGrid = Union[Grid, "DeviceMesh"]

# docs/design.md: a process group has one group of its own
_GROUPS: WeakKeyDictionary[ProcessGroup, Group] = WeakKeyDictionary()


def group_of(ranks: Ranks) -> Group:
    """The group itself; of a process group or a 1-D device mesh the one group that all get who ask here.

    Raises:
        TypeError: it is none of these.
        ValueError: the mesh has more than one dimension, or this process is not a member.
        RuntimeError: torch.distributed is not initialised.
    """
    if isinstance(ranks, Group):
        return ranks
    if ranks is None:  # dist.group.WORLD before there are processes
        raise TypeError(
            "ranks are given as a seqpar.Group, a process group or a mesh dimension, got None; is "
            "torch.distributed initialised?"
        )
    processes = process_group_of(ranks)
    made = _GROUPS.get(processes)
    # Threads that ask at once get the same.
    return _GROUPS.setdefault(processes, Group.of(processes)) if made is None else made


def grid_of(ranks: RanksOfGrid) -> Grid:
    """The grid itself, or that of a 2-D device mesh of all processes, over their one group.

    Raises:
        TypeError: it is neither.
        ValueError: the mesh is not 2-D, or not of all processes: `Grid.of` takes the group of others.
        RuntimeError: torch.distributed is not initialised.
    """
    if isinstance(ranks, Grid):
        return ranks
    if not hasattr(ranks, "mesh_dim_names"):
        raise TypeError(
            "ranks in two dimensions are a seqpar.Grid, such as group.grid(ulysses=2), or a 2-D device mesh, "
            f"got {ranks!r}"
        )
    return Grid.of(ranks, group_of(process_group_of(None)))
