"""What is not finite is found, also where two tensors are looked at as one."""

import pytest
import torch

from seqpar_kernels import may_hold_poison
from seqpar_kernels.finite import _are_beside, _joined

NAN, INF = float("nan"), float("inf")


def packed(batch=1, rows=6, heads=2, widths=(3, 4), rows_first=True):
    """K and v as a message holds them."""
    shape = (rows, batch, heads) if rows_first else (batch, rows, heads)
    message = torch.ones(*shape, sum(widths))
    parts = (message.transpose(0, 1) if rows_first else message).split_with_sizes(widths, -1)
    return message, parts


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rows_first", [True, False])
def test_k_and_v_of_a_message_are_one_tensor(batch, rows_first):
    message, (k, v) = packed(batch, rows_first=rows_first)
    (whole,) = _joined((k, v))
    assert whole.data_ptr() == message.data_ptr()
    assert whole.numel() == message.numel()
    q = torch.ones(2, 2)
    assert [x.numel() for x in _joined((q, k, v, q))] == [4, message.numel(), 4]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (1, 5, 1, -1)])
def test_one_element_is_found_in_either(bad, which, at):
    _, tensors = packed(batch=2)
    assert not may_hold_poison(*tensors)
    tensors[which][at] = bad
    assert may_hold_poison(*tensors)
    assert may_hold_poison(*reversed(tensors))


def test_what_does_not_lie_side_by_side_is_looked_at_apart():
    _, (k, v) = packed()
    _, (other_k, _) = packed()
    _, thirds = packed(widths=(3, 4, 5))
    pairs = [
        (v, k), (k, k), (k, other_k), (k[:, :3], v[:, 1:4]), (k[:, :3], v), (k[..., :2], v), thirds[:2],
        (thirds[0], thirds[2]), (k.reshape(-1), v), (torch.ones(3), torch.ones(3)),
        (k[..., 0], v[..., 0]), (k.view(torch.int32).view(torch.float32), v.view(torch.int32)),
    ]  # fmt: skip
    for x, y in pairs:
        assert not _are_beside(x, y)
        assert [one.shape for one in _joined((x, y))] == [x.shape, y.shape]
    assert _are_beside(k[:, 1:3], v[:, 1:3])
    # What is between the rows that are looked at is not.
    message, (k, v) = packed()
    message[4] = NAN
    assert not may_hold_poison(k[:, :4], v[:, :4])
    assert may_hold_poison(k, v)
