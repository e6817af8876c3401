"""`Ranks`: who shares a sequence with whom, and what becomes of their gradients."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.distributed as dist
from torch import nn

import seqpar
from byte_lm.recipe import ATTENTIONS, GRIDS, Recipe
from seqpar import Grid, Group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, eq=False)
class Ranks:
    """dp x sp ranks: neighbours share sequences, and are a replica.

    Args:
        everyone: all ranks.
        sharers: those that share this rank's sequences.
        replica: which replica that is.
        grid: the sharers in two dimensions, where the strategy asks for them.
    """

    everyone: Group
    sharers: Group
    replica: int
    grid: Grid | None

    @staticmethod
    def of(group: Group, recipe: Recipe) -> Ranks:
        """The ranks as a recipe arranges them. Creates no process group and communicates nothing.

        Raises:
            ValueError: there are not dp x sp ranks, or not ring x ulysses sharers.
        """
        if group.size % recipe.dp:
            raise ValueError(f"{group.size} ranks cannot be dp={recipe.dp} replicas of one size")
        sharers, replica = group, 0
        if recipe.dp > 1:
            dp_by_sp = group.grid(ring=recipe.dp)
            sharers, (replica, _) = dp_by_sp.ulysses, dp_by_sp.index_of(group.rank)
        grid = None
        if recipe.strategy in GRIDS:
            divisors = [n for n in range(1, sharers.size + 1) if sharers.size % n == 0]
            root = max(n for n in divisors if n <= math.isqrt(sharers.size))
            grid = sharers.grid(ulysses=recipe.ulysses or root)
        return Ranks(group, sharers, replica, grid)

    def attention(self, recipe: Recipe) -> nn.Module:
        """A module of the recipe's strategy, for the sequences of this rank."""
        mask = seqpar.Mask(causal=True)
        where = self.sharers if self.grid is None else self.grid
        module: nn.Module = ATTENTIONS[recipe.strategy](where, mask=mask)
        return module


@dataclass(frozen=True, eq=False)
class Gradients:
    """How the ranks' gradients become one: summed after backward, or averaged by FSDP during it.

    Args:
        ranks: whose gradients.
        mesh: 1-D, of all ranks, over which FSDP shards parameters; `None`: they are replicated.
    """

    ranks: Ranks
    mesh: DeviceMesh | None

    @staticmethod
    def of(ranks: Ranks, device: str, fsdp: bool) -> Gradients:
        """Sharded over all processes with `fsdp`.

        Raises:
            ValueError: FSDP was asked for, and the ranks are not all the processes of torch.distributed.
        """
        if not fsdp:
            return Gradients(ranks, None)
        if not dist.is_initialized() or dist.get_world_size() != ranks.everyone.size:
            raise ValueError(
                f"FSDP shards over all processes that torchrun has started, got {ranks.everyone}"
            )
        from torch.distributed.device_mesh import DeviceMesh

        world = dist.group.WORLD
        assert world is not None, "it is initialised"
        return Gradients(ranks, DeviceMesh.from_group(world, device))

    @property
    def combined(self) -> Literal["sum", "mean"]:
        """What `seqpar.mean_loss` must know."""
        return "sum" if self.mesh is None else "mean"

    def prepare(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        """Shards the parameters: those of a block are whole only while it runs. All ranks call."""
        if self.mesh is not None:
            from torch.distributed.fsdp import fully_shard

            for block in blocks:
                fully_shard(block, mesh=self.mesh)
            fully_shard(model, mesh=self.mesh)

    def step(self, model: nn.Module) -> AbstractContextManager[None]:
        """A block for all backwards of a step, on all ranks."""
        if self.mesh is not None:
            return nullcontext()
        return seqpar.summed_gradients(model, self.ranks.everyone, axes=(self.ranks.sharers,))
