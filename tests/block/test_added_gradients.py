"""Gradients of a narrow type are added to wide sums without a wide copy of them all."""

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from seqpar_kernels import aten
from seqpar_kernels.torch_internals import allocated


@pytest.mark.parametrize("sign", [1, -1, 0])
@pytest.mark.parametrize("rows", [1, aten.ADDED_ROWS, 4 * aten.ADDED_ROWS + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_added_is_the_sum(dtype, rows, sign):
    total, grad = torch.randn(2, 3, rows, 4), torch.randn(2, rows, 3, 4).to(dtype).transpose(1, 2)
    due = total + sign * grad.float()
    aten._add(total, grad, sign)
    assert torch.equal(total, due)


def test_a_narrow_gradient_is_not_copied_whole():
    rows = 16 * aten.ADDED_ROWS
    total, grad = torch.zeros(1, 4, rows, 32), torch.ones(1, rows, 4, 32, dtype=torch.bfloat16)
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        aten._add(total, grad.transpose(1, 2))
    most = max(accumulate(size for _, size in allocated(profiled)))
    assert most <= total.nbytes / 8
