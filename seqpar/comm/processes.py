"""The transport over torch.distributed: any backend with point-to-point messages (gloo, NCCL, ...)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.comm.objects import gather_objects, largest
from seqpar.comm.transport import AGREE, Message, Operation, ReduceOp

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class ProcessTransport:
    """One rank of a process group.

    Refers to the process group without keeping it alive: gloo's threads end only when the last
    reference is gone, and a process that exits before them may abort.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        # docs/design.md: a `Group` does not keep its process group alive
        self._reference = weakref.ref(group)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._prepared: set[str] = set()
        self._peers = [dist.get_global_rank(group, rank) for rank in range(self.size)]

    @staticmethod
    def of(ranks: dist.ProcessGroup | DeviceMesh | None) -> ProcessTransport:
        """The transport of a process group or of a 1-D mesh, see `Group.of`."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "torch.distributed is not initialised: launch with torchrun and call "
                "torch.distributed.init_process_group() first, or use seqpar.simulate or Group.alone()"
            )
        if ranks is None:
            ranks = dist.group.WORLD
        elif not isinstance(ranks, dist.ProcessGroup) and hasattr(ranks, "get_group"):
            if ranks.ndim != 1:
                names = ranks.mesh_dim_names
                raise ValueError(
                    f"one mesh dimension makes a group, got {names}; pass mesh['name']"
                )
            ranks = ranks.get_group()
        if ranks is dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
            raise ValueError(f"rank {dist.get_rank()} is not a member of this process group")
        if not isinstance(ranks, dist.ProcessGroup):
            raise TypeError(f"expected a ProcessGroup, a DeviceMesh or None, got {type(ranks)}")
        return ProcessTransport(ranks)

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._reference()
        if group is None:
            raise RuntimeError("the process group of this seqpar.Group has been destroyed")
        return group

    @property
    def control_device(self) -> torch.device:
        """The CPU where the group's backend serves it, else this process's accelerator."""
        if self._has_tags:
            return torch.device("cpu")
        return torch.device(torch.accelerator.current_accelerator() or "cpu")

    @property
    def _has_tags(self) -> bool:
        """Whether messages on the control device are told apart: gloo has tags, NCCL none."""
        return "gloo" in str(dist.get_backend_config(self._group))

    @property
    def global_ranks(self) -> list[int]:
        """The ranks of the group among all processes, by rank in the group."""
        return self._peers

    def prepare(self, device: torch.device) -> None:
        """Lets all ranks use the backend of a device once, where agreement went over another one.

        NCCL wants every rank in the first call of a group, which an exchange need not have.
        """
        # Agreement has already used the backend of the control device, on all ranks.
        if device.type not in {self.control_device.type, *self._prepared}:
            dist.all_reduce(torch.zeros(1, device=device), group=self._group)
            self._prepared.add(device.type)

    def exchange(
        self,
        primitive: str,
        sends: Sequence[Message],
        receives: Sequence[Message],
        operation: Operation = (),
    ) -> _ProcessPending:
        """Starts a batch of isend and irecv."""
        group, peers, tag = self._group, self._peers, _tag(primitive, operation)
        ops = [dist.P2POp(dist.isend, x, peers[peer], group, tag) for peer, x in sends]
        ops += [dist.P2POp(dist.irecv, x, peers[peer], group, tag) for peer, x in receives]
        with _explained(primitive, self.rank):
            works = dist.batch_isend_irecv(ops) if ops else []
        return _ProcessPending(primitive, self.rank, works, [x for _, x in (*sends, *receives)])

    def all_reduce(self, x: Tensor, op: ReduceOp) -> None:
        """Reduces a tensor over all ranks, in place."""
        with _explained("all_reduce", self.rank):
            dist.all_reduce(x, _REDUCE_OPS[op], group=self._group)

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over ranks of a few numbers on the control device."""
        if self._has_tags:
            # docs/design.md: agreement never meets data
            return largest(self, x)
        x = x.clone()
        self.all_reduce(x, "max")
        return x

    def gather_objects(self, item: object) -> list[object]:
        """Gathers every rank's object, by rank."""
        return gather_objects(self, item)


def _tag(primitive: str, operation: Operation) -> int:
    """What gloo tells messages apart by, 31 bits: two that should not meet do in one of 10^9 cases."""
    return 1 if primitive == AGREE else crc32(f"{primitive}{operation}".encode()) >> 2 | 1 << 30


class _ProcessPending:
    """Messages under way, whose buffers are held until they have gone."""

    def __init__(
        self, primitive: str, rank: int, works: Sequence[dist.Work], buffers: Sequence[Tensor]
    ) -> None:
        self._primitive, self._rank, self._works, self._buffers = primitive, rank, works, buffers

    def wait(self) -> None:
        with _explained(self._primitive, self._rank):
            for work in self._works:
                work.wait()
        self._works, self._buffers = (), ()


class _explained:  # noqa: N801 - reads as a phrase
    """Adds to an error of the wire where it broke, and that the cause may be another rank."""

    def __init__(self, primitive: str, rank: int) -> None:
        self._primitive, self._rank = primitive, rank

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise RuntimeError(
                f"rank {self._rank} failed in {self._primitive}: {error}. If another rank failed or "
                "ended first, its error is the one to read"
            ) from error
