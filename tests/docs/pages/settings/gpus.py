"""What the block of docs/gpus.md needs."""

import torch

import seqpar


def warm_up():
    group = seqpar.Group.of()
    layout = seqpar.zigzag(26, group.size)
    q, k, v = torch.randn(3, 1, layout.rows[group.rank], 4, 8)
    yield {
        "group": group,
        "layout": layout,
        "mask": seqpar.Mask(causal=True),
        "q": q,
        "k": k,
        "v": v,
    }
    assert group.traffic.total.bytes > 0, "it connects the ranks"
