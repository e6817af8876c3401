"""What is not finite is found, also where two tensors are looked at as one."""

import pytest
import torch

from seqpar_kernels import finite, may_hold_poison
from seqpar_kernels.finite import _are_beside

NAN, INF = float("nan"), float("inf")


def packed(batch=1, rows=6, heads=2, widths=(3, 4), rows_first=True):
    """K and v as a message holds them."""
    shape = (rows, batch, heads) if rows_first else (batch, rows, heads)
    message = torch.ones(*shape, sum(widths))
    parts = (message.transpose(0, 1) if rows_first else message).split_with_sizes(widths, -1)
    return message, parts


@pytest.fixture
def sums(monkeypatch):
    """The shapes that are summed."""
    shapes, real = [], finite._sum
    monkeypatch.setattr(finite, "_sum", lambda x: (shapes.append(tuple(x.shape)), real(x))[1])
    return shapes


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rows_first", [True, False])
def test_k_and_v_of_a_message_are_one_sum(batch, rows_first, sums):
    message, (k, v) = packed(batch, rows_first=rows_first)
    q = torch.ones(2, 2)
    assert not may_hold_poison(q, k, v, q)
    assert sums == [(2, 2), (batch, 6, 2, 7), (2, 2)]
    assert message.numel() == batch * 6 * 2 * 7


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (1, 5, 1, -1)])
def test_one_element_is_found_in_either(bad, which, at):
    _, tensors = packed(batch=2)
    assert not may_hold_poison(*tensors)
    tensors[which][at] = bad
    assert may_hold_poison(*tensors)
    assert may_hold_poison(*reversed(tensors))


def test_what_does_not_lie_side_by_side_is_looked_at_apart(sums):
    _, (k, v) = packed()
    _, (other_k, _) = packed()
    _, thirds = packed(widths=(3, 4, 5))
    _, (row, next_to_it) = packed(rows=1, heads=1)
    _, (all_of_it, nothing) = packed(widths=(3, 0))
    pairs = [
        (v, k), (k, k), (k, other_k), (k[:, :3], v[:, 1:4]), (k[:, :3], v), (k[..., :2], v), thirds[:2],
        (thirds[0], thirds[2]), (k.reshape(-1), v), (torch.ones(3), torch.ones(3)), (row, next_to_it),
        (k[..., 0], v[..., 0]), (all_of_it, nothing), (k, v.view(torch.int32)),
    ]  # fmt: skip
    for x, y in pairs:
        assert not _are_beside(x, y)
        sums.clear()
        assert not may_hold_poison(x, y)
        assert sums == [tuple(x.shape), tuple(y.shape)]
    assert _are_beside(k[:, 1:3], v[:, 1:3])
    # What is between the rows that are looked at is not.
    message, (k, v) = packed()
    message[4] = NAN
    assert not may_hold_poison(k[:, :4], v[:, :4])
    assert may_hold_poison(k, v)
