"""`FusedQKV`: where the rows of q, k and v are in a weight that holds them all, as data.

Models fuse the three projections in different orders, which have the same shape: cut in another model's
order, a weight gives other heads and no error. Not here: which model has which (`known_models`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from seqpar.layout.heads import HeadSplit, split_heads

Component = Literal["q", "k", "v"]


@dataclass(frozen=True)
class FusedQKV:
    """The layout of a fused weight: outer blocks, in each of them q, k and v in some order, head by head.

    Component c of head j is the rows `((j // m_c) * W + off_c + j % m_c) * head_dim + i`, i < head_dim,
    where m_c heads of c are in a block, W of all three, and off_c of those that come before c.

    Methods take weights `[rows, e]` (`[e, rows]` where transposed) and biases `[rows]` alike.

    Args:
        num_heads: query heads.
        num_kv_heads: heads of keys and as many of values, each for num_heads / num_kv_heads query heads.
        head_dim: rows of a head.
        blocks: outer blocks: 1 for three contiguous parts, num_heads for head by head, num_kv_heads for
            group by group.
        order: of the components in a block.
        bias: whether there is a bias of as many rows.
        transposed: whether the weight is `[e, rows]`, as that of GPT-2's Conv1D.

    Raises:
        ValueError: a number is not positive, the blocks do not divide the heads, or num_kv_heads does not
            divide num_heads, or the order is not one of q, k and v.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    blocks: int = 1
    order: str = "qkv"
    bias: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        counts = {n: getattr(self, n) for n in ("num_heads", "num_kv_heads", "head_dim", "blocks")}
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts.values()):
            raise ValueError(
                f"the counts of a fused weight must be positive integers, got {counts}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_heads must be a multiple of num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}"
            )
        if self.num_heads % self.blocks or self.num_kv_heads % self.blocks:
            raise ValueError(
                f"{self.blocks} blocks must hold equally many of the {self.num_heads} query heads and of the "
                f"{self.num_kv_heads} kv heads"
            )
        if sorted(self.order) != sorted("qkv"):
            raise ValueError(f"order must have q, k and v once each, got {self.order!r}")

    @staticmethod
    def contiguous(
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        *,
        bias: bool = False,
        transposed: bool = False,
    ) -> FusedQKV:
        """All of q, then all of k, then all of v. By default as many kv heads as query heads."""
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        return FusedQKV(num_heads, kv_heads, head_dim, bias=bias, transposed=transposed)

    @staticmethod
    def per_head(
        num_heads: int, head_dim: int, *, bias: bool = False, transposed: bool = False
    ) -> FusedQKV:
        """q, k and v of the first head, then of the second, and so on."""
        return FusedQKV(num_heads, num_heads, head_dim, num_heads, bias=bias, transposed=transposed)

    @staticmethod
    def per_group(
        num_heads: int,
        head_dim: int,
        num_kv_heads: int,
        *,
        bias: bool = False,
        transposed: bool = False,
    ) -> FusedQKV:
        """The query heads of the first kv head, then its k and v, then those of the second, and so on."""
        return FusedQKV(
            num_heads, num_kv_heads, head_dim, num_kv_heads, bias=bias, transposed=transposed
        )

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def heads_per_block(self) -> tuple[int, int, int]:
        """How many heads of each component are in a block, in `order`."""
        q, kv = self.num_heads // self.blocks, self.num_kv_heads // self.blocks
        first, second, third = (q if c == "q" else kv for c in self.order)
        return first, second, third

    def index(self, component: Component, head: int) -> range:
        """The rows of a head.

        Raises:
            ValueError: there is no such component or head.
        """
        if component not in get_args(Component):
            raise ValueError(f"component must be q, k or v, got {component!r}")
        # docs/design.md: a fused QKV weight is data
        place, counts = self.order.index(component), self.heads_per_block
        per_block = counts[place]
        if not 0 <= head < per_block * self.blocks:
            raise ValueError(
                f"head must be 0 ... {per_block * self.blocks - 1} of {component}, got {head}"
            )
        block, within = divmod(head, per_block)
        start = (block * sum(counts) + sum(counts[:place]) + within) * self.head_dim
        return range(start, start + self.head_dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each with its heads in order; a copy where they are not contiguous.

        Raises:
            ValueError: x has not the rows of this layout.
        """
        self._check(x, self.rows, "a fused weight or bias")
        x = self._rows_first(x)
        whole = rearrange(x, "(g w d) ... -> g w d ...", g=self.blocks, d=self.head_dim)
        parts = dict(zip(self.order, whole.split(self.heads_per_block, dim=1), strict=True))
        q, k, v = (
            self._rows_first(rearrange(parts[c], "g m d ... -> (g m d) ..."))
            for c in get_args(Component)
        )
        return q, k, v

    def fuse(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The inverse of `split`, contiguous.

        Raises:
            ValueError: q, k or v has not the rows of its heads.
        """
        given = {"q": q, "k": k, "v": v}
        for name, x in given.items():
            heads = self.num_heads if name == "q" else self.num_kv_heads
            self._check(x, heads * self.head_dim, name)
        sizes = {"g": self.blocks, "d": self.head_dim}
        parts = [
            rearrange(self._rows_first(given[c]), "(g m d) ... -> g m d ...", **sizes)
            for c in self.order
        ]
        whole = rearrange(torch.cat(parts, dim=1), "g w d ... -> (g w d) ...")
        return self._rows_first(whole).contiguous()

    def deal(self, size: int, *, replicate: bool = True) -> HeadSplit:
        """Which heads each of `size` ranks takes: ranges of query heads and the kv heads that they need.

        Args:
            replicate: whether a kv head may be on several ranks, where its query heads are.

        Raises:
            ValueError: there are more ranks than query heads, or kv heads would have to be replicated and may
                not be.
        """
        if not 1 <= size <= self.num_heads:
            raise ValueError(
                f"{self.num_heads} query heads can be dealt to 1 ... {self.num_heads} ranks, got {size}; a "
                "rank without heads would only wait. Shard the sequence over the others"
            )
        dealt = split_heads(self.num_heads, self.num_kv_heads, size)
        if dealt.replicates and not replicate:
            raise ValueError(
                f"{size} ranks cannot share {self.num_heads} query heads without replicating some of the "
                f"{self.num_kv_heads} kv heads; take a divisor of {self.num_kv_heads}, or replicate=True"
            )
        return dealt

    def shard(self, x: Tensor, rank: int, size: int, *, replicate: bool = True) -> Tensor:
        """What a rank holds of x: its q, k and v, one after the other, contiguous whatever `order` is.

        Raises:
            ValueError: x has not the rows of this layout, there is no such rank, or as `deal`.
        """
        dealt = self.deal(size, replicate=replicate)
        if not 0 <= rank < size:
            raise ValueError(f"rank must be 0 ... {size - 1}, got {rank}")
        dim = self.dim(x)
        ranges = dealt.q[rank], dealt.kv[rank], dealt.kv[rank]
        parts = (
            part.narrow(dim, start * self.head_dim, (stop - start) * self.head_dim)
            for part, (start, stop) in zip(self.split(x), ranges, strict=True)
        )
        return torch.cat(list(parts), dim)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """The inverse of `shard`, from the shards of all ranks in order.

        Raises:
            ValueError: a shard has not its rows or is not of the others' dtype and width, or copies of a kv
                head differ in a bit.
        """
        dealt = self.deal(len(shards))
        for rank, x in enumerate(shards):
            self._check(
                x, sum(self.sizes(dealt, rank)), f"the shard of rank {rank} of {len(shards)}"
            )
            if (first := self._kind(shards[0])) != (kind := self._kind(x)):
                raise ValueError(
                    f"all shards must be alike, got {first} of rank 0, {kind} of rank {rank}"
                )
        heads: dict[tuple[str, int], tuple[int, Tensor]] = {}
        for rank, x in enumerate(shards):
            for (component, head), rows in self._heads_of(dealt, rank):
                mine = x.narrow(self.dim(x), rows.start, self.head_dim)
                owner, theirs = heads.setdefault((component, head), (rank, mine))
                if not torch.equal(_bits(mine), _bits(theirs)):
                    raise ValueError(
                        f"{component} of kv head {head} differs between ranks {owner} and {rank}: its copies "
                        "must be given the sum of their gradients (share_heads); what drifted by rounding "
                        "alone, seqpar.tensor_parallel.settle_copies makes the same again"
                    )
        dim, counts = self.dim(shards[0]), (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = (
            torch.cat([heads[c, j][1] for j in range(n)], dim)
            for c, n in zip(get_args(Component), counts, strict=True)
        )
        return self.fuse(q, k, v)

    def first_copies(self, shards: Sequence[Tensor], rank: int) -> Tensor:
        """The shard of a rank with every head as the first rank holds it that has it. Rows come first."""
        dealt = self.deal(len(shards))
        first: dict[tuple[str, int], Tensor] = {}
        for holder, x in enumerate(shards[: rank + 1]):
            for head, own in self._heads_of(dealt, holder):
                first.setdefault(head, x[own.start : own.stop])
        return torch.cat([first[head] for head, _ in self._heads_of(dealt, rank)])

    def runs(self, dealt: HeadSplit, rank: int) -> list[tuple[Component, int, int]]:
        """The runs of heads (component, start, stop) that a rank's shard is made of, in order."""
        return [("q", *dealt.q[rank]), ("k", *dealt.kv[rank]), ("v", *dealt.kv[rank])]

    def sizes(self, dealt: HeadSplit, rank: int) -> list[int]:
        """How many rows of q, of k and of v a rank's shard has."""
        return [(stop - start) * self.head_dim for _, start, stop in self.runs(dealt, rank)]

    def dim(self, x: Tensor) -> int:
        """The dimension of x that its rows are in."""
        return 1 if self.transposed and x.ndim == 2 else 0

    def _heads_of(
        self, dealt: HeadSplit, rank: int
    ) -> Iterator[tuple[tuple[Component, int], range]]:
        """Every head of a rank's shard and its rows there."""
        row = 0
        for component, start, stop in self.runs(dealt, rank):
            for head in range(start, stop):
                yield (component, head), range(row, row + self.head_dim)
                row += self.head_dim

    def _kind(self, x: Tensor) -> tuple[torch.dtype, torch.device, tuple[int, ...]]:
        """What all shards of one tensor have in common: dtype, device, and all but the rows of the shape."""
        return x.dtype, x.device, tuple(n for dim, n in enumerate(x.shape) if dim != self.dim(x))

    def _rows_first(self, x: Tensor) -> Tensor:
        return x.T if self.dim(x) == 1 else x

    def _check(self, x: Tensor, rows: int, what: str) -> None:
        if x.ndim not in (1, 2) or x.shape[self.dim(x)] != rows:
            raise ValueError(
                f"{what} must have {rows} rows{' in its last dimension' if self.transposed else ''}, for "
                f"{self.num_heads} query and {self.num_kv_heads} kv heads of {self.head_dim}, got "
                f"{tuple(x.shape)}"
            )


def _bits(x: Tensor) -> Tensor:
    """The bytes of x: NaN equals itself there, and 0 is not -0."""
    return x.detach().contiguous().view(torch.uint8)
