"""What the blocks of docs/adding.md need."""

import torch


def term():
    names = {}
    yield names
    # The gradient of the constants, by autograd through the definition.
    q, k, v, offsets = (names[name] for name in ("q", "k", "v", "offsets"))
    offsets = offsets.clone().requires_grad_()
    s = 0.5 * torch.einsum("bihd,bjhd->bhij", q, k) + offsets[:, None, None]
    s = s.masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf)
    p = s.exp() / (1 + s.exp().sum(-1, keepdim=True))
    out = torch.einsum("bhij,bjhd->bihd", p, v)
    torch.testing.assert_close(names["out"], out.detach())
    (wanted,) = torch.autograd.grad(out.sum(), offsets)
    torch.testing.assert_close(names["share"].sum((0, 1)), wanted)
