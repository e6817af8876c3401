"""What the block of docs/decode.md needs."""

import torch

import seqpar


def decoding():
    group = seqpar.Group.of()
    layout = seqpar.zigzag(13, group.size)
    k, v = torch.randn(2, 1, layout.rows[group.rank], 2, 8)
    torch.manual_seed(0)  # new tokens are the same on all ranks
    attend = seqpar.RingAttention(group, mask=seqpar.Mask(causal=True))
    names = {"group": group, "layout": layout, "k": k, "v": v, "attend": attend}
    names |= dict(zip(("k_new", "v_new"), torch.randn(2, 1, 1, 2, 8), strict=True))
    names["q"] = torch.randn(1, 1, 4, 8)
    yield names
    assert names["out"].shape == names["q"].shape
