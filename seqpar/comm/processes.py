"""The transport over torch.distributed: any backend with point-to-point messages (gloo, NCCL, ...)."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.comm.agree import DesyncError, named_ranks
from seqpar.comm.gloo_threads import calm_gloo
from seqpar.comm.objects import gather_objects, largest
from seqpar.comm.transport import AGREE, NO_OPERATION, Message, Operation, ReduceOp
from seqpar.comm.waits import Wait
from seqpar.comm.watch import Watch
from seqpar_kernels.torch_internals import WATCHING, missing, own_store

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
LOGGER = logging.getLogger("seqpar")
_WAITS = (
    "a group of {backends} alone compares calls on the device, and each waits until the device is done: "
    "start it by init_process_group('cpu:gloo,cuda:nccl', device_id=...), or use agree='plan'"
)
_AGREEMENT, _NOTHING = 1, 2  # tags: of agreement, and of what is never sent
# What gloo and NCCL say of a connection, and not of a tensor that they do not take.
_OF_THE_WIRE = re.compile(r"onnect|imed out|peer|[Ss]ocket|pipe|[Aa]bort|pair closure|remote")


class ProcessTransport:
    """One rank of a process group.

    Refers to the process group without keeping it alive: gloo's threads end only when the last
    reference is gone, and a process that exits before them may abort.
    """

    def __init__(self, group: dist.ProcessGroup, patience: float) -> None:
        # docs/design.md: a `Group` does not keep its process group alive
        self._reference = weakref.ref(group)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # Messages on the control device are told apart: gloo has tags, NCCL none.
        self._backends = str(dist.get_backend_config(group))
        self._has_tags = "gloo" in self._backends
        if self._has_tags:
            # docs/design.md: gloo's threads wait for a CPU
            calm_gloo()
        elif self.size > 1 and self.rank == 0:
            # docs/design.md: over NCCL alone a call waits
            LOGGER.warning("%s", _WAITS.format(backends=self._backends))
        self._name = group.group_name
        self._prepared: set[str] = set()
        self._served = {"meta"}
        self._watch = _watch(patience) if self.size > 1 else None
        self._peers = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        self._others = [peer for rank, peer in enumerate(self._peers) if rank != self.rank]
        self._members = named_ranks(self._peers)

    @staticmethod
    def of(ranks: dist.ProcessGroup | DeviceMesh | None, patience: float) -> ProcessTransport:
        """The transport of a process group or of a 1-D mesh, see `Group.of`."""
        if not patience > 0:
            raise ValueError(f"patience is a number of seconds above 0, got {patience!r}")
        return ProcessTransport(process_group_of(ranks), patience)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group, while it is not destroyed."""
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
    def global_ranks(self) -> list[int]:
        """The ranks of the group among all processes, by rank in the group."""
        return self._peers

    def check_device(self, device: torch.device) -> None:
        """Raises a ValueError if the group cannot send from this device, or it is not the current one."""
        if self.size > 1 and device.type not in self._served:
            current = torch.accelerator.current_device_index() if device.type != "cpu" else None
            reason = unserved(self._backends, device, current)
            if reason is not None:
                raise ValueError(reason)
            if device.type == "cpu":  # another device may be the current one at the next call
                self._served.add("cpu")

    def prepare(self, device: torch.device) -> None:
        """Lets all ranks use the backend of a device once, where agreement went over another one.

        NCCL wants every rank in the first call of a group, which an exchange need not have.
        """
        # Agreement has already used the backend of the control device, on all ranks.
        if device.type not in {self.control_device.type, *self._prepared}:
            self._reduce(torch.zeros(1, device=device), dist.ReduceOp.SUM, "first use of a device")
            self._prepared.add(device.type)

    def exchange(
        self,
        primitive: str,
        sends: Sequence[Message],
        receives: Sequence[Message],
        operation: Operation = NO_OPERATION,
    ) -> _ProcessPending:
        """Starts a batch of isend and irecv."""
        group, peers, tag = self.process_group, self._peers, _tag(primitive, operation)
        # docs/design.md: receives are posted before sends
        ops = [dist.P2POp(dist.irecv, x, peers[peer], group, tag) for peer, x in receives]
        ops += [dist.P2POp(dist.isend, x, peers[peer], group, tag) for peer, x in sends]
        everyone = [peers[peer] for peer, _ in (*receives, *sends)]
        waiting = self._waiting(everyone, primitive, operation)
        with waiting:
            works = dist.batch_isend_irecv(ops) if ops else []
        # Where several messages are one piece of work, it waits for all of their peers.
        awaited = [[peer] for peer in everyone] if len(works) == len(ops) else [everyone]
        buffers = [x for _, x in (*receives, *sends)]
        return _ProcessPending(list(zip(works, awaited, strict=False)), waiting, buffers)

    def all_reduce(self, x: Tensor, op: ReduceOp, operation: Operation) -> None:
        """Reduces a tensor over all ranks, in place."""
        self._reduce(x, _REDUCE_OPS[op], "all_reduce", operation)

    def largest(self, x: Tensor, operation: Operation) -> Tensor:
        """The elementwise maximum over ranks of a few numbers on the control device: agreement."""
        if self._has_tags:
            # docs/design.md: agreement never meets data
            return largest(self, x, operation)
        x = x.clone()
        self._reduce(x, dist.ReduceOp.MAX, AGREE, operation)
        return x

    def gather_objects(self, item: object) -> list[object]:
        """Gathers every rank's object, by rank."""
        return gather_objects(self, item)

    def _reduce(
        self,
        x: Tensor,
        op: dist.ReduceOp.RedOpType,
        primitive: str,
        operation: Operation = NO_OPERATION,
    ) -> None:
        with self._waiting(self._others, primitive, operation):
            dist.all_reduce(x, op, group=self.process_group)

    def _waiting(self, peers: Sequence[int], primitive: str, operation: Operation) -> _Waiting:
        what = f"{primitive} of {operation.name}" if operation.name else primitive
        what = f"{what} among {self._members}"
        place = f"{self._name} {operation.numbers}"
        return _Waiting(self._watch, self.rank, peers, place, what, self._wake)

    def _wake(self) -> None:
        """Ends the waits of this process in an error: nothing can be sent in this group any more."""
        group = self.process_group
        if not self._has_tags:
            group.abort()
            return
        # gloo gives up all connections when a wait on one of them takes too long, and has no other way.
        for peer in self._others:
            with suppress(RuntimeError):  # that it took too long, or that this connection is closed
                never = dist.irecv(torch.zeros(1), peer, group, tag=_NOTHING)
                assert never is not None, "this rank is in the group"
                never.wait(timedelta(milliseconds=1))


def process_group_of(ranks: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """The process group that is given, or that of a 1-D mesh; by default that of all processes.

    Raises:
        RuntimeError, ValueError, TypeError: as `Group.of`.
    """
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
            raise ValueError(f"one mesh dimension makes a group, got {names}; pass mesh['name']")
        ranks = ranks.get_group()
    if ranks is dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
        raise ValueError(f"rank {dist.get_rank()} is not a member of this process group")
    if not isinstance(ranks, dist.ProcessGroup):
        raise TypeError(f"expected a ProcessGroup, a DeviceMesh or None, got {type(ranks)}")
    return ranks


def unserved(backends: str, device: torch.device, current: int | None) -> str | None:
    """Says why a group cannot send tensors of a device, and what to do; `None` if it can.

    Args:
        backends: of the group, as torch has them: "cpu:gloo,cuda:nccl".
        current: the index of the current device of this process.
    """
    backend = dict(pair.split(":") for pair in backends.split(",")).get(device.type)
    # gloo reduces tensors of CUDA, but sends none of them point to point.
    if backend is None or (backend == "gloo" and device.type != "cpu"):
        return (
            f"tensors on {device.type} cannot be sent in a group of {backends}: start it by "
            "init_process_group('cpu:gloo,cuda:nccl', device_id=...), or use tensors on a device that it has"
        )
    if device.index not in (None, current) and device.type != "cpu":
        return (
            f"tensors are on {device}, but the current device of this process is {device.type}:{current}, "
            f"which its messages go by: call torch.accelerator.set_device_index({device.index}) first"
        )
    return None


def _tag(primitive: str, operation: Operation) -> int:
    """What gloo tells messages apart by, 31 bits: two that should not meet do in one of 10^9 cases."""
    if primitive == AGREE:
        return _AGREEMENT
    return crc32(f"{primitive}{operation.numbers}".encode()) >> 2 | 1 << 30


class _ProcessPending:
    """Messages under way, whose buffers are held until they have gone."""

    def __init__(
        self,
        works: Sequence[tuple[dist.Work | None, list[int]]],
        waiting: _Waiting,
        buffers: Sequence[Tensor],
    ) -> None:
        self._works, self._waiting, self._buffers = works, waiting, buffers

    def wait(self) -> None:
        if self._works:
            with self._waiting as waiting:
                for work, peers in self._works:
                    # docs/design.md: a wait is watched, not timed
                    waiting.turn_to(peers)
                    if work is not None:
                        work.wait()
        self._works, self._buffers = (), ()


class _Waiting:
    """A block that waits for peers; an error of the wire becomes one that names the rank it is about.

    Args:
        peers: global ranks.
        place, what: as `Wait` has them.
    """

    def __init__(
        self,
        watch: Watch | None,
        rank: int,
        peers: Sequence[int],
        place: str,
        what: str,
        wake: Callable[[], None],
    ) -> None:
        self._watch, self._rank, self._args = watch, rank, (peers, place, what, wake)
        self._wait: Wait | None = None

    def __enter__(self) -> _Waiting:
        self._wait = None if self._watch is None else self._watch.begin(*self._args)
        return self

    def turn_to(self, peers: Sequence[int]) -> None:
        """Waits for these from now on: what the others send is here."""
        if self._wait is not None:
            self._wait.turn_to(peers)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        watch, wait, self._wait = self._watch, self._wait, None
        if watch is not None and wait is not None:
            watch.finish(wait)
        if not isinstance(error, RuntimeError) or not _OF_THE_WIRE.search(str(error)):
            return
        why = str(error) if watch is None or wait is None else watch.why(wait, error)
        told = f"rank {self._rank} failed in {self._args[2]}: {why}"
        if watch is not None:
            watch.end(told)
        raise DesyncError(f"{told}. Nothing more can be sent in this group") from error


# By the process group of all: the watch of this process.
_WATCHES: weakref.WeakKeyDictionary[dist.ProcessGroup, Watch] = weakref.WeakKeyDictionary()


def _watch(patience: float) -> Watch | None:
    """The watch of this process, of the shortest patience that was asked for; `None` if torch lacks it."""
    world = dist.group.WORLD
    if world is None or missing(WATCHING) is not None:
        return None
    watch = _WATCHES.get(world)
    if watch is None:
        watch = _WATCHES[world] = Watch(own_store(), dist.get_rank(), patience)
        weakref.finalize(world, watch.leave)
    watch.patience = min(watch.patience, patience)
    return watch
