"""`ParallelAttention`: an attention layer with its projections, its heads over tp ranks, its rows over sp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from seqpar.calls.options import told
from seqpar.comm import Group, agreed, agreed_backward, all_reduce, replicate
from seqpar.functional import attention as attend
from seqpar.layout import Layout, check_mark
from seqpar.layout.fits import check_rows, check_size
from seqpar.layout.heads import HeadSplit
from seqpar.module import Attention
from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.rotary import Angles, Rotary
from seqpar.tensor_parallel.shared_heads import share_heads, shared_heads
from seqpar.tensor_parallel.whole_weights import Names, WholeWeights
from seqpar_kernels import Score
from seqpar_kernels.transfer import on_device


class ParallelAttention(nn.Module):
    """Self-attention of a model: q, k, v projections, norms, rotary, attention, output projection.

    Ranks of `tp` hold the same rows and share the heads: each projects its own (the weights are cut by
    output), attends them, and adds its part of the result (the output weight is cut by input): one all-reduce
    of `[b sl e]` forward, one backward. Ranks of the attention's group hold other rows and the same weights.
    x must be the same on all ranks of `tp`.

    Parameters are this rank's shards: `qkv_weight` `[rows, e]`, q's heads, then k's, then v's; `qkv_bias`;
    `out_weight` `[e, columns]`; `out_bias`. They are NaN until `load_whole` or `reset_parameters`. Gradients
    are whole over tp after backward, those of replicated kv heads and of norms too; over the ranks that share
    the sequence they are `seqpar.sum_gradients`' to add.

    Args:
        qkv: the heads, and how the whole weight is fused; separate ones count as contiguous.
        width: `e`, of x and of the result.
        attention: such as `seqpar.RingAttention(group, mask=...)`; slopes and sinks of all heads. `None`: the
            caller attends between `heads` and `project`.
        tp: the ranks that share the heads; by default this one alone.
        names: of the whole weights, as `load_whole` takes and `whole_state` gives them.
        out_bias: whether the output projection adds a bias.
        out_transposed: whether its whole weight is `[rows, e]`, as that of a Conv1D.
        rotary: of q and k.
        q_norm, k_norm: modules over the last dimension of `[b sl h d]`, before rotary.
        clip: q, k and v are clamped to [-clip, clip] after their projection.
        replicate_kv: whether kv heads may be on several ranks.

    Raises:
        ValueError: heads cannot be dealt to the ranks, rotary is wider than a head, or names do not fit.
        TypeError: attention is not an attention module of this package.

    Source: Shoeybi et al. 2019, Megatron-LM (arXiv:1909.08053), section 3.
    """

    qkv_bias: nn.Parameter | None
    out_bias: nn.Parameter | None
    is_tensor_parallel = True

    def __init__(
        self,
        qkv: FusedQKV,
        width: int,
        *,
        attention: Attention | None = None,
        tp: Group | None = None,
        names: Names | None = None,
        out_bias: bool = False,
        out_transposed: bool = False,
        rotary: Rotary | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        clip: float | None = None,
        replicate_kv: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if attention is not None and not isinstance(getattr(attention, "group", None), Group):
            raise TypeError(
                f"attention must be a module such as seqpar.RingAttention(group), got {attention!r}"
            )
        if rotary is not None and rotary.dim > qkv.head_dim:
            raise ValueError(f"rotary turns {rotary.dim} components of heads of {qkv.head_dim}")
        self.qkv, self.width, self.attention = qkv, width, attention
        self.tp = Group.alone() if tp is None else tp
        self.rotary, self.q_norm, self.k_norm, self.clip = rotary, q_norm, k_norm, clip
        self.dealt = qkv.deal(self.tp.size, replicate=replicate_kv)
        self.weights = WholeWeights(
            names or Names(), qkv, width, out_bias=out_bias, out_transposed=out_transposed
        )
        self._kv_places = _even_places(self.dealt, self.tp.rank)
        self._sizes = qkv.sizes(self.dealt, self.tp.rank)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, torch.nan, device=device, dtype=dtype))

        # docs/design.md: the layer has parameters of its own
        self.qkv_weight = empty(sum(self._sizes), width)
        self.out_weight = empty(width, self._sizes[0])
        self.register_parameter("qkv_bias", empty(sum(self._sizes)) if qkv.bias else None)
        self.register_parameter("out_bias", empty(width) if out_bias else None)

    @property
    def first_head(self) -> int:
        """This rank's first query head."""
        return self.dealt.q[self.tp.rank][0]

    @property
    def heads_here(self) -> slice:
        """This rank's query heads."""
        return slice(*self.dealt.q[self.tp.rank])

    def forward(
        self, x: Float[Tensor, "b sl e"], layout: Layout, *, angles: Angles | None = None
    ) -> Float[Tensor, "b sl e"]:
        """This rank's rows of the layer. All ranks of tp and of the attention's group must call.

        Args:
            x: this rank's rows, the same on all ranks of tp.
            layout: who holds which rows.
            angles: (cos, sin) of rotary, each `[b sl pairs]`; by default those of the layout's positions.

        Raises:
            ValueError: the layer has no attention of its own, or x does not fit it; and what
                `seqpar.attention` raises.
            DesyncError: ranks differ in x's shape or type, or another rank raised one of the above.
        """
        if self.attention is None:
            raise ValueError("this layer has no attention; make it with attention=, or use heads()")
        tp, sp = self._axes
        with agreed(tp, sp, operation="ParallelAttention") as claim:
            self._check(x)
            check_size(layout, sp.size)
            check_rows(layout, sp.rank, x.shape[1], f"x {tuple(x.shape)}")
            check_mark(x, layout, "x")
            # Along sp ranks have as many rows as the layout says, and all else in common.
            claim |= {
                "shape": (x.shape[0], "rows", x.shape[2]),
                "dtype": x.dtype,
                **told(layout=layout),
            }
        if self.rotary is not None and angles is None:
            angles = self.rotary.angles(on_device(layout.positions(sp.rank), x.device)[None])
        plan = self.attention.plan(layout)
        q, k, v = self.heads(x, angles)
        plan = replace(plan, score=self.score_here(plan.score), first_head=self.first_head)
        return self.project(attend(q, k, v, plan))

    def heads(
        self, x: Float[Tensor, "b sl e"], angles: Angles | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's q `[b sl hq d]`, k and v `[b sl hkv d]`; backward sums dx over tp.

        Each kv head serves equally many of these query heads: where a rank's range starts or ends within a
        group, kv heads come more than once.
        """
        if self.tp.size > 1:
            x = replicate(x, self.tp)
        # docs/design.md: the gradient of a replicated kv head is summed on the weight
        weight, bias = share_heads(self.qkv_weight, self.qkv_bias, self.tp, self.dealt)
        fused = F.linear(x, weight, bias)
        if self.clip is not None:
            fused = fused.clamp(-self.clip, self.clip)
        q, k, v = (
            part.unflatten(2, (-1, self.qkv.head_dim)) for part in fused.split(self._sizes, 2)
        )
        q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if self.rotary is not None:
            if angles is None:
                raise ValueError("rotary needs the angles of these rows: rotary.angles(positions)")
            q, k = (self.rotary.turn(part, angles) for part in (q, k))
        if self._kv_places is not None:
            k, v = (torch.cat([t[:, :, i : i + 1] for i in self._kv_places], 2) for t in (k, v))
        return q, k, v

    def project(self, out: Float[Tensor, "b sl hq d"]) -> Float[Tensor, "b sl e"]:
        """The output projection of all heads from those of this rank. All ranks of tp must call."""
        y = F.linear(out.flatten(2), self.out_weight)
        if self.tp.size > 1:
            y = all_reduce(y, self.tp)
            (y,) = agreed_backward([y], self.tp, operation="ParallelAttention")
        return y if self.out_bias is None else y + self.out_bias.to(y.dtype)

    def score_here(self, score: Score) -> Score:
        """The terms of this rank's heads, from those of all; slopes and sinks that learn do so from all.

        Raises:
            ValueError: slopes or sinks are not one per query head.
        """
        tensors = score.tensors
        for name, term in tensors.items():
            if len(term) != self.qkv.num_heads:
                raise ValueError(
                    f"{name} must be one for each of {self.qkv.num_heads} query heads, got {len(term)}"
                )
            if term.requires_grad and self.tp.size > 1:
                tensors[name] = replicate(term, self.tp)
        whole = score.with_tensors(tensors)
        return whole.of_heads(self.first_head, self.dealt.num_q(self.tp.rank))

    def load_whole(self, state: Mapping[str, Tensor]) -> None:
        """Takes this rank's shards from the whole weights, which every rank gives. All ranks must call.

        Args:
            state: the weights of the attention module of a model, under its names.

        Raises:
            ValueError: a weight is missing, unexpected, or of another shape or type. Nothing is written then.
            DesyncError: another rank raised one of the above.
        """
        with agreed(*self._axes, operation="load_whole"):
            shards = self.weights.shards(self, state)
        with torch.no_grad():
            for parameter, shard in shards:
                parameter.copy_(shard)

    def whole_state(self) -> dict[str, Tensor]:
        """The whole weights under the model's names, the same bytes that were loaded. All ranks must call.

        Raises:
            ValueError: copies of a kv head differ between ranks.
        """
        return self.weights.whole(self)

    def elements_sent(self, *, tokens: int) -> tuple[int, int]:
        """What this rank sends to the others of tp, in elements: (forward, backward). Exact, and tested.

        An all-reduce of `[tokens, e]` each way, counted as the 2 (P - 1) / P of it that a ring sends;
        backward also the gradients of replicated kv heads and of the norms.

        Args:
            tokens: rows of the batch on this rank, b * sl.
        """
        size = self.tp.size
        whole = -(-2 * (size - 1) * tokens * self.width // size)
        columns = self.width + (self.qkv_bias is not None)
        copies = shared_heads(self.dealt, self.tp.rank) * 2 * self.qkv.head_dim * columns
        norms = [
            p.numel() for norm in (self.q_norm, self.k_norm) if norm for p in norm.parameters()
        ]
        return whole, whole + copies + sum(-(-2 * (size - 1) * n // size) for n in norms)

    def reset_parameters(self, seed: int) -> None:
        """Draws the whole weights as torch's Linear does, and takes the shards; the same for any tp."""
        generator = torch.Generator().manual_seed(seed)
        self.load_whole(self.weights.drawn(self, generator))

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        heads = f"heads={self.qkv.num_heads}, kv_heads={self.qkv.num_kv_heads}"
        here = f"here {self.dealt.q[self.tp.rank]}, {self.dealt.kv[self.tp.rank]}"
        return f"{self.width}, {heads}, head_dim={self.qkv.head_dim}, tp={self.tp.size}, {here}"

    def _normed(self, norm: nn.Module | None, x: Tensor) -> Tensor:
        """Norms this rank's heads. Its weights see no others, so their gradients are summed over tp."""
        if norm is None or self.tp.size == 1:
            return x if norm is None else norm(x)
        shared = {name: replicate(p, self.tp) for name, p in norm.named_parameters()}
        return functional_call(norm, shared, (x,))

    @property
    def _axes(self) -> tuple[Group, Group]:
        """The ranks that share heads with this one, and those that share the sequence."""
        return self.tp, Group.alone() if self.attention is None else self.attention.group

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor [b sl e], got {type(x).__name__}")
        if x.ndim != 3 or x.shape[2] != self.width:
            raise ValueError(f"x must be [b sl {self.width}], got {tuple(x.shape)}")
        like = self.qkv_weight
        if x.device != like.device:
            raise ValueError(f"x must be on {like.device}, got {x.device}")
        if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x must be {like.dtype}, as the weights, got {x.dtype}")


def _even_places(dealt: HeadSplit, rank: int) -> tuple[int, ...] | None:
    """The kv heads of a rank, some repeated, so that each serves equally many query heads; `None`: as is."""
    (start, stop), first = dealt.q[rank], dealt.kv[rank][0]
    group = dealt.hq // dealt.hkv
    serving = [head // group - first for head in range(start, stop)]
    runs = [serving.count(kv) for kv in range(dealt.num_kv(rank))]
    if len(set(runs)) == 1:
        return None
    # docs/design.md: uneven groups are made even by repeating kv heads
    return tuple(serving[:: gcd(*runs)])
