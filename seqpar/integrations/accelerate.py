"""accelerate where processes share sequences: they are given the same batches, and gather what one holds.

accelerate deals batches out to processes. Those that share a sequence need one batch together, so batches are
dealt out to replicas here: groups of processes, each of which shares its sequences. Two parts of Accelerator
that are used here are not documented: `_dataloaders`, which prepared loaders join, and `_prepare_cp`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader

from seqpar.comm import Group, agreed
from seqpar.module import Attention
from seqpar.requires import require

require("accelerate", by="seqpar.integrations.accelerate", extra="trainer")

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply

Attend = Attention | Callable[[Group], Attention]
MARK = "seqpar_replicas"  # of an Accelerator that shares sequences


@dataclass(frozen=True, eq=False)
class Replicas:
    """Which processes share sequences with which.

    Args:
        everyone: all processes.
        members: by replica, the processes that share its sequences, by their global ranks.
        index: of the replica that this process is part of.
    """

    everyone: Group
    members: tuple[tuple[int, ...], ...]
    index: int

    @staticmethod
    def of(group: Group, everyone: Group) -> Replicas:
        """The replicas that arise where every process names the group that it shares sequences with.

        All processes must call.

        Raises:
            ValueError: groups overlap without being the same, or have several sizes.
        """
        mine = [int(rank) for rank in group.transport.global_ranks]
        table = cast("list[list[int]]", everyone.transport.gather_objects(mine))
        if any(table[member] != theirs for theirs in table for member in theirs):
            raise ValueError(
                f"processes that share sequences must all name the same group, got, by process, {table}"
            )
        members = sorted({tuple(theirs) for theirs in table})
        if len({len(theirs) for theirs in members}) > 1:
            raise ValueError(f"every sequence must be shared by as many processes, got {members}")
        return Replicas(everyone, tuple(members), members.index(tuple(mine)))

    @property
    def size(self) -> int:
        """How many processes share a sequence."""
        return len(self.members[0])


def share_sequences(accelerator: Accelerator, attend: Attend) -> tuple[Attention, Replicas]:
    """Has an Accelerator deal out batches to processes that share sequences together. Before its `prepare`.

    Loaders then give those processes the same batches, and `gather_for_metrics` takes what one of them holds;
    `gather` and `reduce` take what every process holds, as ever. Every process reads a stream by itself.
    Where the mesh has a dimension "cp", models are left as they are: accelerate would take the masks from
    their layers, for torch's own context parallelism. All must call; calling again changes nothing.

    Args:
        attend: an attention module, whose group says which processes share sequences. Or what makes one of a
            group, such as `seqpar.RingAttention`: of the processes along "cp", as
            `ParallelismConfig(cp_size=...)` has them, and of all where there is no mesh.

    Returns:
        The attention module, and which processes share sequences with which.

    Raises:
        NotImplementedError: the mesh has a dimension for tensor parallelism.
        ValueError: as `Replicas.of`; or loaders have been prepared, or dispatch_batches is asked for, or the
            Accelerator shares sequences otherwise already.
        DesyncError: another process raised one of the above.
    """
    everyone = Group.of() if accelerator.num_processes > 1 else Group.alone()
    before: Replicas | None = getattr(accelerator, MARK, None)
    with agreed(everyone, operation="share_sequences"):
        mesh = accelerator.torch_device_mesh
        if mesh is not None and "tp" in mesh.mesh_dim_names:
            raise NotImplementedError(
                "accelerate's tensor parallelism is not supported beside shared sequences; see "
                "seqpar.integrations.transformers.replace_attention"
            )
        if before is None and accelerator._dataloaders:
            raise ValueError(
                "share sequences before accelerator.prepare(...) is given a data loader"
            )
        if accelerator.dispatch_batches:
            raise ValueError(
                "dispatch_batches=True has process 0 cut each batch for all processes, some of which share "
                "sequences; leave it out"
            )
        if not isinstance(attend, Attention):
            attend = attend(_group_of(accelerator))
    replicas = Replicas.of(attend.group, everyone)
    if before is not None:
        if before.members != replicas.members:
            raise ValueError(
                f"this Accelerator shares sequences among {before.members} already, not {replicas.members}"
            )
        return attend, before
    setattr(accelerator, MARK, replicas)
    if replicas.size > 1:
        accelerator.prepare_data_loader = partial(_dealt, accelerator, replicas)
        accelerator.prepare_scheduler = _no_scheduler
        accelerator.gather_for_metrics = partial(_gathered_once, accelerator, replicas)
        accelerator._prepare_cp = _unchanged
    return attend, replicas


def _group_of(accelerator: Accelerator) -> Group:
    mesh = accelerator.torch_device_mesh
    if mesh is not None and "cp" in mesh.mesh_dim_names:
        return Group.of(mesh["cp"])
    if mesh is not None or accelerator.num_processes == 1:
        return Group.alone()
    return Group.of()


def _dealt(
    accelerator: Accelerator,
    replicas: Replicas,
    loader: DataLoader[Any],
    device_placement: bool | None = None,
    slice_fn_for_dispatch: object = None,  # noqa: ARG001 - nothing is dispatched
) -> DataLoader[Any]:
    """What `Accelerator.prepare_data_loader` does, for replicas instead of processes."""
    if loader in accelerator._dataloaders:
        return loader
    if device_placement is None:
        device_placement = accelerator.device_placement
    init = loader.worker_init_fn
    # Trainer's seeds workers by process.
    if isinstance(init, partial) and "rank" in init.keywords:
        loader.worker_init_fn = partial(init, rank=replicas.index)
    dealt = prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=len(replicas.members),
        process_index=replicas.index,
        split_batches=accelerator.split_batches,
        put_on_device=device_placement,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=False,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )
    accelerator._dataloaders.append(dealt)
    return dealt


def _no_scheduler(scheduler: object) -> None:
    """Refuses schedulers: accelerate steps a prepared one as often as there are processes."""
    raise NotImplementedError(
        f"{type(scheduler).__name__} must not be given to accelerator.prepare where processes share "
        "sequences: it would take a step for each process; step it yourself, once a step"
    )


def _unchanged(*prepared: Any) -> tuple[Any, ...]:
    return prepared


def _gathered_once(
    accelerator: Accelerator, replicas: Replicas, input_data: Any, use_gather_object: bool = False
) -> Any:
    """What `Accelerator.gather_for_metrics` gives, with the rows of one process of each replica."""
    if use_gather_object:
        raise NotImplementedError(
            "objects are not gathered where processes share sequences; leave use_gather_object out"
        )
    firsts = [ranks[0] for ranks in replicas.members]
    state = accelerator.gradient_state
    # As there: the last batches may repeat sequences, so that every replica has one.
    end = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

    def once(x: Tensor) -> Tensor:
        by_process = x.unflatten(0, (replicas.everyone.size, -1))
        return by_process[firsts].flatten(0, 1)[:end]

    return recursively_apply(once, accelerator.gather(input_data), error_on_other_type=True)
