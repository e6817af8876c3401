"""`Experts`: a mixture of experts on one device, and spread over ranks that send each other rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, EXPERTS, TOP = 12, 4, 2


class AllToAll(torch.autograd.Function):
    """The first rows to the first rank, and so on -> those that came.    backward  the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], came: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.back = came, sent, group
        result = rows.new_empty(sum(came), rows.shape[1])
        dist.all_to_all_single(result, rows.contiguous(), came, sent, group=group)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return AllToAll.apply(grads[0], *ctx.back), None, None, None


class Experts(nn.Module):
    """The sum of the best experts for each row, times their weights; no row is dropped.

    Args:
        ep: over whose ranks experts are spread, in order; all are here where there are none.
    """

    def __init__(self, ep: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.ep, self.num_ranks = ep, 1 if ep is None else ep.size()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.empty(EXPERTS, WIDTH, 2 * WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, 2 * WIDTH, WIDTH))

    @property
    def held(self) -> slice:
        """The experts of this rank."""
        num, rank = EXPERTS // self.num_ranks, 0 if self.ep is None else self.ep.rank()
        return slice(rank * num, (rank + 1) * num)

    def keep_own(self) -> None:
        """Gives up the experts of other ranks."""
        self.up = nn.Parameter(self.up[self.held].detach().clone())
        self.down = nn.Parameter(self.down[self.held].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.gate(rows).softmax(-1).topk(TOP)
        if self.ep is None:  # in no way as it is done over ranks
            each = F.gelu(rows @ self.up) @ self.down  # [experts rows width]
            weigh = torch.zeros(len(rows), EXPERTS, dtype=x.dtype).scatter(1, chosen, weights)
            return torch.einsum("re,erw->rw", weigh, each).view(x.shape)
        expert = chosen.flatten()
        order = expert.argsort(stable=True)
        counts = expert.bincount(minlength=EXPERTS).view(self.num_ranks, -1)
        here = torch.empty_like(
            counts
        )  # rows for each expert of this rank, by the rank that they are of
        dist.all_to_all_single(here, counts, group=self.ep)
        sent, came = counts.sum(1).tolist(), here.sum(1).tolist()
        rows = AllToAll.apply(rows[order // TOP], sent, came, self.ep)
        whose = torch.arange(here.shape[1]).repeat(self.num_ranks).repeat_interleave(here.flatten())
        out = torch.zeros_like(rows)
        for n, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            at = (whose == n).nonzero().flatten()
            out = out.index_add(0, at, F.gelu(rows[at] @ up) @ down)
        out = AllToAll.apply(out, came, sent, self.ep)
        out = torch.zeros_like(out).index_copy(0, order, out).unflatten(0, (-1, TOP))
        return (out * weights.unsqueeze(2)).sum(1).view(x.shape)
