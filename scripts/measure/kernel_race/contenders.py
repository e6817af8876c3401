"""Who is measured: the block math of `seqpar`, on one rank or all ranks in turn, and torch's attention.

A contender is made from whole tensors, has steps to run in order, and then the results. The oracle for
long sequences is here too; it shares no code with any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import seqpar
from kernel_race.setting import Setting, Tensors
from seqpar.layout import Layout, Mask, joined_tiles, tiles
from seqpar.layout.shards import whole
from seqpar.testing import oracle
from seqpar_kernels import (
    IMPLEMENTATIONS,
    Block,
    Implementation,
    Partial,
    Request,
    Rows,
    Score,
    accumulation_dtype,
    attend,
    attend_backward,
    finish,
    preference,
    refusal,
)

Step = Callable[[], None]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Meeting = tuple[int, list[tuple[slice, slice, Block]]]  # owner; local rows, its rows, block


class Contender(Protocol):
    """Something that computes attention and its gradients."""

    forward: list[Step]
    backward: list[Step]

    def results(self) -> Tensors:
        """Out, dq, dk, dv, once all steps have run."""


Makers = Mapping[str, Callable[[], Contender]]


class Ranks:
    """The block math of all ranks of a ring, one after the other on one device, with no messages.

    One rank is attention over the whole sequence. A step is what one rank computes; the last one of
    the backward is the conversion of dk and dv, which ranks do when the sums are home.
    """

    def __init__(
        self, tensors: Tensors, layout: Layout, mask: Mask, implementation: Implementation
    ) -> None:
        self._layout, self._implementation = layout, implementation
        device, ranks = tensors[0].device, range(layout.size)
        self._shards = [[x[:, layout.positions(r).to(device)] for x in tensors] for r in ranks]
        self._meetings = [meetings(layout, mask, tensors[0].shape[-1], r) for r in ranks]
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._dq: dict[int, Tensor] = {}
        self._dkdv: dict[int, tuple[Tensor, Tensor]] = {}
        self.forward: list[Step] = [partial(self._forward, r) for r in ranks]
        self.backward: list[Step] = [partial(self._backward, r) for r in ranks]
        self.backward.append(self._home)

    def _forward(self, rank: int) -> None:
        q, _, v, _ = self._shards[rank]
        running = Partial.identity(q, v.shape[-1])
        for owner, blocks in self._meetings[rank]:
            _, k_o, v_o, _ = self._shards[owner]
            for rows, cols, block in blocks:
                attend(
                    q[:, rows], k_o[:, cols], v_o[:, cols], block,
                    into=running[rows], implementation=self._implementation,
                )  # fmt: skip
        self._saved[rank] = finish(running, q.dtype, Score(), implementation=self._implementation)

    def _backward(self, rank: int) -> None:
        q, _, _, dout = self._shards[rank]
        out, lse = self._saved[rank]
        wide = accumulation_dtype(q.dtype)
        mine = Rows.of(q, out, dout, lse, implementation=self._implementation)
        dq = torch.zeros_like(q, dtype=wide)
        for owner, blocks in self._meetings[rank]:
            _, k_o, v_o, _ = self._shards[owner]
            share = torch.zeros_like(k_o, dtype=wide), torch.zeros_like(v_o, dtype=wide)
            for rows, cols, block in blocks:
                into = dq[:, rows], share[0][:, cols], share[1][:, cols]
                attend_backward(
                    mine[rows], k_o[:, cols], v_o[:, cols], block,
                    into=into, implementation=self._implementation,
                )  # fmt: skip
            if rank > 0:  # the first rank's share begins the sum
                for x, total in zip(share, self._sums[owner], strict=True):
                    x.add_(total)
            self._sums[owner] = share
        self._dq[rank] = dq.to(q.dtype)

    def _home(self) -> None:
        for owner, (dk, dv) in self._sums.items():
            _, k, v, _ = self._shards[owner]
            self._dkdv[owner] = dk.to(k.dtype), dv.to(v.dtype)

    def results(self) -> Tensors:
        """Out, dq, dk, dv in the order of positions."""
        ranks, inverse = range(self._layout.size), self._layout.inverse()
        by_rank = (
            [self._saved[r][0] for r in ranks],
            [self._dq[r] for r in ranks],
            [self._dkdv[r][0] for r in ranks],
            [self._dkdv[r][1] for r in ranks],
        )
        out, dq, dk, dv = (torch.cat(xs, 1)[:, inverse.to(xs[0].device)] for xs in by_rank)
        return out, dq, dk, dv


def meetings(layout: Layout, mask: Mask, d: int, rank: int) -> list[Meeting]:
    """The blocks of a rank's queries and every owner's keys, in the order in which owners pass by."""
    score = Score().resolve(d)
    met = []
    for step in range(layout.size):
        owner = (rank - step) % layout.size
        joined = joined_tiles(tiles(layout.spans[rank], layout.spans[owner], mask, *mask.layers))
        blocks = [
            (t.rows, t.cols, Block(t.band, score, t.row, t.col, t.step, terms=mask.terms))
            for t in joined
        ]
        met.append((owner, blocks))
    return met


class Torch:
    """An attention that autograd differentiates. It sees `[b h s d]` views of `[b s h d]`."""

    def __init__(self, tensors: Tensors, attention: Attention) -> None:
        *leaves, self._dout = (x.transpose(1, 2) for x in tensors)
        self._leaves = [x.detach().requires_grad_() for x in leaves]
        self._attention = attention
        self.forward: list[Step] = [self._forward]
        self.backward: list[Step] = [self._backward]

    def _forward(self) -> None:
        with torch.enable_grad():
            self._out = self._attention(*self._leaves)

    def _backward(self) -> None:
        self._grads = torch.autograd.grad(self._out, self._leaves, self._dout)
        self._out = self._out.detach()  # the graph has served

    def results(self) -> Tensors:
        """Out, dq, dk, dv."""
        out, dq, dk, dv = (x.detach().transpose(1, 2) for x in (self._out, *self._grads))
        return out, dq, dk, dv


def contenders(setting: Setting, tensors: Tensors) -> Makers:
    """Everyone who may try a setting. Making or running one may fail, and says why.

    "seqpar" is a whole call of one rank; with the name of an implementation, its blocks alone.
    """
    causal, is_grouped = setting.causal, setting.heads != setting.kv_heads

    def sdpa(backend: SDPBackend) -> Contender:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=is_grouped
                )

        return Torch(tensors, attention)

    def flex() -> Contender:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.compiler.reset()  # or the shapes of earlier settings count towards a limit
        compiled = torch.compile(flex_attention, dynamic=False)
        n, device = setting.tokens, tensors[0].device.type
        shown, mask = None, setting.mask
        if mask != Mask():
            shown = create_block_mask(_shows(mask, device), None, None, n, n, device=device)
        return Torch(
            tensors, lambda q, k, v: compiled(q, k, v, block_mask=shown, enable_gqa=is_grouped)
        )

    layout = whole(setting.tokens)
    plan = seqpar.Plan(seqpar.Group.alone(), layout, setting.mask, strategy="ulysses")

    def public(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return seqpar.attention(*(x.transpose(1, 2) for x in (q, k, v)), plan).transpose(1, 2)

    ours: dict[str, Callable[[], Contender]] = {"seqpar": lambda: Torch(tensors, public)}
    ours |= {
        f"seqpar {name}": partial(Ranks, tensors, layout, setting.mask, name)
        for name in implementations(setting, tensors[0].device)
    }
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    if setting.mask != Mask(causal):  # which torch's do not take
        backends = {}
    torchs = {f"torch {name}": partial(sdpa, backend) for name, backend in backends.items()}
    return {**ours, **torchs, "torch flex": flex}


def implementations(setting: Setting, device: torch.device) -> list[Implementation]:
    """The fast implementations that can do a setting: in order of preference, then those by name only."""
    kinds = tuple(type(term) for term in setting.mask.terms)
    request = Request(device, setting.dtype, setting.d, setting.d, kinds)
    names = dict.fromkeys((*preference(request), *IMPLEMENTATIONS))
    slow = {"reference", "triton" if device.type == "cpu" else "reference"}
    return [n for n in names if n not in slow and refusal(n, request) is None]


def _shows(mask: Mask, device: str) -> Callable[..., Tensor]:
    """The mask as FlexAttention takes it."""
    if mask.documents is None and mask.window is None:
        return lambda _b, _h, i, j: i >= j
    if mask.documents is None:
        return lambda _b, _h, i, j: (i >= j) & (i - j < mask.window)
    bounds = torch.tensor(mask.bounds, device=device)
    document = torch.searchsorted(bounds, torch.arange(mask.bounds[-1], device=device), right=True)
    return lambda _b, _h, i, j: (i >= j) & (document[i] == document[j])


def exact(tensors: Tensors, mask: Mask, chunk: int = 256) -> tuple[Tensors, Tensor]:
    """(out, dq, dk, dv) and lse in float64, by the definition, `chunk` rows at a time."""
    q, k, v, dout = (x.double() for x in tensors)
    group, scale = q.shape[2] // k.shape[2], 1 / math.sqrt(q.shape[3])
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (dout, q, k, v))
    lse = torch.zeros_like(q[..., 0])
    seen = oracle.visible(q.shape[1], mask.causal, mask.window, mask.documents).to(q.device)
    for start in range(0, q.shape[1], chunk):
        rows = slice(start, min(start + chunk, q.shape[1]))
        s = torch.einsum("bihd,bjhd->bhij", q[:, rows], k) * scale
        s.masked_fill_(~seen[rows], float("-inf"))
        lse[:, rows] = torch.logsumexp(s, dim=-1).transpose(1, 2)
        p = torch.softmax(s, dim=-1)
        out[:, rows] = torch.einsum("bhij,bjhd->bihd", p, v)
        dp = torch.einsum("bihd,bjhd->bhij", dout[:, rows], v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[:, rows] = torch.einsum("bhij,bjhd->bihd", ds, k)
        dk += torch.einsum("bhij,bihd->bjhd", ds, q[:, rows])
        dv += torch.einsum("bhij,bihd->bjhd", p, dout[:, rows])
    dk, dv = (x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))
    return (out, dq, dk, dv), lse
