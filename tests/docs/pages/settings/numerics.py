"""What the block of docs/numerics.md needs."""

import torch

import seqpar


def same_bits():
    names = {"group": seqpar.Group.of(), "length": 130}
    yield names
    rows = names["layout"].rows[names["group"].rank]
    assert seqpar.attention(*torch.randn(3, 1, rows, 2, 16), names["plan"]).isfinite().all()
