"""What the blocks of docs/adding.md need."""

from dataclasses import replace

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import seqpar
from seqpar.integrations.transformers import replace_attention
from seqpar.integrations.transformers.replace import original
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


def family():
    """The model attends over ranks as on one device; a family that forgets a factor is refused."""
    monkeypatch = pytest.MonkeyPatch()
    names = {}
    yield names
    granite = names["granite"]
    config = GraniteConfig(
        vocab_size=16, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_multiplier=0.3,
    )  # fmt: skip
    forgets = replace(granite, terms=lambda module: {"scaling": module.head_dim**-0.5})
    for known, is_refused in ((forgets, True), (granite, False)):
        monkeypatch.setattr(original, "FAMILIES", (*original.FAMILIES, known))
        torch.manual_seed(0)
        model = GraniteForCausalLM(config).double().eval()
        if is_refused:
            with pytest.raises(NotImplementedError, match="returns other"):
                replace_attention(model)
        else:
            replace_attention(model)
        monkeypatch.undo()


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
