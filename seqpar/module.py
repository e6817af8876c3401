"""The modules: a plan without its layout, which comes with the call."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from seqpar.comm import Group
from seqpar.functional import attention
from seqpar.layout import Layout, Mask
from seqpar.strategies import Plan, Strategy
from seqpar_kernels import Dropout, Implementation, Score


class _Attention(nn.Module):
    """Attention over a sequence that is spread over the ranks of a group. Holds no parameters.

    Args:
        group: the ranks that share the sequence.
        mask: what a position may see; by default everything.
        score: what happens to q.k before the softmax; by default the scale 1/sqrt(d). Where its tensors
            learn, assign to `.score` in every forward, see `seqpar.Score`.
        implementation: of the block math; `None` chooses by device, dtype and what is asked.
        dropout: of the attention weights, in training mode only; the same on every rank. Assign to
            `.dropout` to give every step a seed of its own.
    """

    strategy: ClassVar[Strategy]

    def __init__(
        self,
        group: Group,
        *,
        mask: Mask = Mask(),  # noqa: B008 - frozen
        score: Score = Score(),  # noqa: B008 - frozen
        implementation: Implementation | None = None,
        dropout: Dropout | None = None,
    ) -> None:
        super().__init__()
        self.group, self.mask, self.score = group, mask, score
        self.implementation, self.dropout = implementation, dropout

    def forward(
        self,
        q: Float[Tensor, "b sl hq d"],
        k: Float[Tensor, "b sl hkv d"],
        v: Float[Tensor, "b sl hkv vd"],
        layout: Layout,
    ) -> Float[Tensor, "b sl hq vd"]:
        """This rank's rows of the attention over the whole sequence; see `seqpar.attention`."""
        return attention(q, k, v, self.plan(layout))

    def plan(self, layout: Layout) -> Plan:
        """The plan of a call with this layout."""
        return Plan(
            self.group, layout, self.mask, self.score, self.strategy, self.implementation,
            self.dropout if self.training else None,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"{self.group}, mask={self.mask}, score={self.score}, dropout={self.dropout}"


class RingAttention(_Attention):
    """Queries stay, key/value blocks travel; no limit from heads; a rank holds its own rows only."""

    strategy = "ring"


class UlyssesAttention(_Attention):
    """Rows are traded for heads, whole sequences attended, and traded back; works best for P <= hq."""

    strategy = "ulysses"
