"""What the blocks of docs/adding.md need."""

import torch

import seqpar
from seqpar.strategies import STRATEGIES


def strategy():
    """What the new one gives, gradients included, is what another gives."""
    group, mask = seqpar.Group.of(), seqpar.Mask(causal=True, window=9)
    layout = seqpar.zigzag(26, group.size)
    q, k, v = (torch.randn(1, layout.rows[group.rank], h, 8) for h in (4, 2, 2))
    names = {"group": group, "layout": layout, "mask": mask, "q": q, "k": k, "v": v}
    yield names
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    plans = names["plan"], seqpar.Plan(group, layout, mask)
    found = [seqpar.attention(*leaves, plan) for plan in plans]
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in found]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients)
    del STRATEGIES["gathered"]


def layout():
    group = seqpar.Group.of()
    x = torch.randn(1, 100, 2, 8, generator=torch.Generator().manual_seed(0))
    attend = seqpar.RingAttention(group, mask=seqpar.Mask(causal=True))
    names = {"seqpar": seqpar, "group": group, "x": x, "attend": attend}
    yield names
    whole = seqpar.unshard_sequence(names["out"], names["layout"], group)
    one = seqpar.Group.alone()
    alone = seqpar.RingAttention(one, mask=attend.mask)(x, x, x, seqpar.contiguous(100, 1))
    torch.testing.assert_close(whole, alone)
