"""The modules: a plan without its layout, which comes with the call."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqpar.calls import agree_on_call
from seqpar.comm import Grid, Ranks, RanksOfGrid, grid_of, group_of
from seqpar.functional import attention
from seqpar.layout import Layout, Mask
from seqpar.strategies import Plan, attention_weights
from seqpar.strategies.plan import Agree
from seqpar_kernels import Dropout, Implementation, Score

Shard = Literal["rows", "columns", "depth"]
Masks = Mask | tuple[Mask, ...] | list[Mask]


class Options(TypedDict, total=False):
    """The options that all attention modules take, as `Attention` has them."""

    mask: Masks
    score: Score
    implementation: Implementation | None
    dropout: Dropout | None
    invariant: bool | None
    agree: Agree


class Attention(nn.Module):
    """Attention over a sequence that is spread over the ranks of a group. Holds no parameters.

    This is the type of all attention modules here, such as `RingAttention`; make one of those.

    Args:
        group: the ranks that share the sequence: a `seqpar.Group`, a process group of torch, or one dimension
            of a device mesh. Modules that are given one process group have one `.group`.
        mask: what a position may see; by default everything.
        score: what happens to q.k before the softmax; by default the scale 1/sqrt(d). Where its tensors
            learn, assign to `.score` in every forward, see `seqpar.Score`.
        implementation: of the block math; `None` chooses by device, dtype and what is asked.
        dropout: of the attention weights, in training mode only; the same on every rank. Assign to
            `.dropout` to give every step a seed of its own.
        invariant: whether results must be the same bits for any number of ranks; see `seqpar.Plan`.
        agree: whether ranks compare every "call", or each kind of call of a "plan" once; see `seqpar.Plan`.

    Raises:
        TypeError: group is none of these, or there is no such option.
        ValueError: the mesh has more than one dimension, or this process is not a member.
        RuntimeError: torch.distributed is not initialised.
    """

    strategy: str
    grid: Grid | None = None
    head_chunks: int = 1
    _last: Plan | None = None  # here, for modules that were pickled without

    def __init__(
        self,
        group: Ranks,
        *,
        mask: Masks = Mask(),  # noqa: B008 - frozen
        score: Score = Score(),  # noqa: B008 - frozen
        implementation: Implementation | None = None,
        dropout: Dropout | None = None,
        invariant: bool | None = None,
        agree: Agree = "call",
    ) -> None:
        super().__init__()
        self.group, self.score = group_of(group), score
        self.mask = tuple(mask) if isinstance(mask, list) else mask
        self.implementation, self.dropout, self.invariant = implementation, dropout, invariant
        self.agree = agree

    def forward(
        self,
        q: Float[Tensor, "b sl hq d"],
        k: Float[Tensor, "b slk hkv d"],
        v: Float[Tensor, "b slk hkv vd"],
        layout: Layout,
        *,
        kv_layout: Layout | None = None,
    ) -> Float[Tensor, "b sl hq vd"]:
        """This rank's rows of the attention over the whole sequence; see `seqpar.attention`.

        Args:
            kv_layout: of k and v, where they are another sequence than q.
        """
        return attention(q, k, v, self.plan(layout, kv_layout))

    def plan(self, layout: Layout, kv_layout: Layout | None = None) -> Plan:
        """The plan of a call with this layout: the last one where nothing differs, as it has decided much."""
        plan = Plan(
            self.group,
            layout,
            mask=self.mask,
            score=self.score,
            strategy=self.strategy,
            implementation=self.implementation,
            # docs/design.md: dropout is off in evaluation mode
            dropout=self.dropout if self.training else None,
            kv_layout=kv_layout,
            invariant=self.invariant,
            grid=self.grid,
            head_chunks=self.head_chunks,
            agree=self.agree,
        )
        if not isinstance(plan.score, Score):
            return plan  # to be refused on all ranks
        if torch.compiler.is_compiling() or plan.score.tensors:
            return plan  # tensors made in a forward must not live on
        last = self._last  # once: threads may share a module
        if last is None or not last.is_as(plan):
            last = self._last = plan
        return last

    def __getstate__(self) -> dict[str, Any]:
        """All but the last plan, which is of this process."""
        return self.__dict__ | {"_last": None}

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"{self.grid or self.group}, mask={self.mask}, score={self.score}, dropout={self.dropout}"


class RingAttention(Attention):
    """Lets queries stay and key/value blocks travel; no limit from heads; a rank holds its own rows only."""

    strategy = "ring"


class UlyssesAttention(Attention):
    """Exchanges rows for heads, all-to-all, attends whole sequences, and exchanges back; best for P <= hq.

    Args:
        head_chunks: in how many chunks heads are exchanged; see `seqpar.Plan`.
    """

    strategy = "ulysses"

    def __init__(self, group: Ranks, *, head_chunks: int = 1, **options: Unpack[Options]) -> None:
        super().__init__(group, **options)
        self.head_chunks = head_chunks


class AllGatherAttention(Attention):
    """Each rank gathers, chunk by chunk, the keys and values that its rows see."""

    strategy = "allgather"


class _GridAttention(Attention):
    """Attention over the ranks of a `Grid`.

    Args:
        grid: the ranks that share the sequence, in two dimensions: a `seqpar.Grid`, or a 2-D device mesh of
            all processes, see `seqpar.Grid.of`. `layout` counts the ranks of `.group`.
    """

    def __init__(self, grid: RanksOfGrid, **options: Unpack[Options]) -> None:
        grid = grid_of(grid)
        super().__init__(grid.group, **options)
        self.grid = grid


class MeshAttention(_GridAttention):
    """Gives each rank a tile of the score matrix: traffic falls with the root of P; no limit from heads.

    `grid.ring` counts the rows of tiles and `grid.ulysses` the columns. Best with a zigzag layout where
    the mask is causal.
    """

    strategy = "mesh"


class HybridAttention(_GridAttention):
    """Runs Ulysses among neighbours and a ring outside: for more ranks than heads, or slow links outside.

    Args:
        head_chunks: in how many chunks heads are exchanged; see `seqpar.Plan`.
    """

    strategy = "hybrid"

    def __init__(
        self, grid: RanksOfGrid, *, head_chunks: int = 1, **options: Unpack[Options]
    ) -> None:
        super().__init__(grid, **options)
        self.head_chunks = head_chunks


class MaterialisedAttention(Attention):
    """Really stores the score matrix, in shards: for study, and to look at attention weights.

    Args:
        shard: by query `rows`, by key `columns`, or by `depth`, the width of heads.
    """

    def __init__(self, group: Ranks, *, shard: Shard = "rows", **options: Unpack[Options]) -> None:
        if shard not in get_args(Shard):
            raise ValueError(f"shard must be one of {get_args(Shard)}, got {shard!r}")
        super().__init__(group, **options)
        self.strategy = f"materialised_{shard}"

    def weights(
        self,
        q: Float[Tensor, "b sl hq d"],
        k: Float[Tensor, "b slk hkv d"],
        layout: Layout,
        *,
        kv_layout: Layout | None = None,
    ) -> Float[Tensor, "b hq i j"]:
        """This rank's shard of the attention matrix, before dropout; no gradient. All ranks must call.

        By rows `[b hq sl s]`: own rows, columns in the order of positions. By columns `[b hq s slk]`: rows
        in the order of positions, own columns. By depth `[b hq s s]`: all of it, on every rank. Rows that
        see nothing are zero; where there are sinks, rows sum to less than 1. Raises what
        `seqpar.attention` does.
        """
        # Weights need no values, so k stands in for v in the checks.
        plan = agree_on_call(q, k, k, self.plan(layout, kv_layout), operation="weights")
        return attention_weights(q, k, plan)
