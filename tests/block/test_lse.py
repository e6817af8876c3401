"""Gradients through lse: out and lse both take part in a loss, against autograd through dense torch."""

import pytest
import torch

from seqpar_kernels import Band, Block, Dropout, Score, attention, attention_with_lse
from seqpar_kernels.reference import visibility

HQ, HKV, D, VD = 4, 2, 8, 5
BAND, STEP, ROW, COL = Band(-40, 3), 2, 9, 5


def problem(dtype, device, num_rows=70):
    """(q, k, v, slopes, sinks) that learn, and the gradients of out and lse."""
    num_cols = num_rows + 5
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).to(device)

    inputs = (
        normal(2, num_rows, HQ, D), normal(2, num_cols, HKV, D), normal(2, num_cols, HKV, VD),
        torch.linspace(0.3, 0.01, HQ, device=device, dtype=dtype), normal(HQ),
    )  # fmt: skip
    return inputs, (normal(2, num_rows, HQ, VD), normal(2, num_rows, HQ))


def dense(q, k, v, slopes, sinks, cap):
    """(out, lse) with the sink as a column of its own, whose value is zero."""
    k, v = (x.repeat_interleave(HQ // HKV, 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * 0.4
    s = s if cap is None else cap * torch.tanh(s / cap)
    num_rows, num_cols = s.shape[2:]
    row, col = ROW + STEP * torch.arange(num_rows)[:, None], COL + STEP * torch.arange(num_cols)
    s = s - slopes[:, None, None] * (row - col).abs()
    s = s.masked_fill(~visibility(BAND, num_rows, num_cols, s.device), -torch.inf)
    s = torch.cat((s, sinks[:, None, None].expand(*s.shape[:-1], 1)), -1)
    out = torch.einsum("bhij,bjhd->bihd", s.softmax(-1)[..., :-1], v)
    return out, s.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("implementation", [None, "reference", "triton"])
def test_gradients_of_out_and_lse_are_those_of_dense_attention(implementation, cap):
    triton = implementation == "triton"
    device = "cuda" if triton and torch.cuda.is_available() else "cpu"
    dtype, num_rows = (torch.float32, 20) if triton else (torch.float64, 70)
    inputs, seeds = problem(dtype, device, num_rows)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    want = dense(*exact, cap)
    want_grads = torch.autograd.grad(want, exact, [x.cpu().double() for x in seeds])

    leaves = [x.requires_grad_() for x in inputs]
    q, k, v, slopes, sinks = leaves
    block = Block(BAND, Score(0.4, cap, slopes, sinks), row=ROW, col=COL, step=STEP)
    got = attention_with_lse(q, k, v, block, implementation=implementation)
    got_grads = torch.autograd.grad(got, leaves, seeds)
    tolerance = 2e-4 if triton else 1e-11
    for x, y in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        torch.testing.assert_close(x.cpu().double(), y, rtol=tolerance, atol=tolerance)


def test_lse_alone_is_differentiable():
    """Nothing reaches v, and dropout, which leaves lse alone, changes no gradient."""
    (q, k, v, slopes, sinks), (_, dlse) = problem(torch.float64, "cpu")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for terms in ((), (Dropout(0.5, 3),)):
        block = Block(BAND, Score(0.4, None, slopes, sinks), terms=terms)
        _, lse = attention_with_lse(q, k, v, block)
        results.append(torch.autograd.grad(lse, leaves, dlse, materialize_grads=True))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    assert (results[0][2] == 0).all()


def test_rows_that_see_nothing_take_no_gradient_from_lse():
    (q, k, v, *_), (_, dlse) = problem(torch.float64, "cpu")
    q.requires_grad_()
    out, lse = attention_with_lse(q, k, v, Block(Band(None, -20), Score(0.4)))
    (dq,) = torch.autograd.grad(lse, q, dlse)
    assert (dq[:, :20] == 0).all()
    assert torch.isfinite(dq).all()
    for x, y in zip(
        (out, lse), attention(q, k, v, Block(Band(None, -20), Score(0.4))), strict=True
    ):
        torch.testing.assert_close(x, y)
