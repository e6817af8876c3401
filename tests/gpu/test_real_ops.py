"""The kernels and the real ops under the adapters, on the GPU, against the reference in float64.

Twins: `tests/block/test_adapters.py` on fakes of the ops, `tests/block/test_terms.py` interpreted.
"""

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from seqpar_kernels import (
    Band,
    Block,
    Partial,
    Ranges,
    Request,
    Rows,
    Score,
    attend,
    attend_backward,
    attention,
    finish,
    refusal,
)

BANDS = st.builds(Band, st.none() | st.integers(-300, 60), st.none() | st.integers(-60, 300))
SIZES = st.integers(0, 400)
WIDTHS = [(16, 16), (24, 1), (40, 40), (64, 64), (96, 128), (128, 128), (192, 128), (256, 256)]


def normal(seed, *shape, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to("cuda")


def attended(implementation, q, k, v, dout, block, ends):
    """(out, lse, dq, dk, dv), with the keys in hops between the ends."""
    hops = list(zip(ends[:-1], ends[1:], strict=True))
    running = Partial.identity(q, v.shape[-1])
    for a, b in reversed(hops):
        attend(q, k[:, a:b], v[:, a:b], block.at(0, a), into=running, implementation=implementation)
    out, lse = finish(running, q.dtype, block.score, implementation=implementation)
    rows = Rows.of(q, out, dout, lse, implementation=implementation)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device="cuda") for x in (q, k, v))
    for a, b in hops:
        attend_backward(
            rows,
            k[:, a:b],
            v[:, a:b],
            block.at(0, a),
            into=(dq, dk[:, a:b], dv[:, a:b]),
            implementation=implementation,
        )
    return out, lse, dq, dk, dv


DRAWN = {
    "band": BANDS,
    "num_rows": SIZES,
    "num_cols": SIZES,
    "heads": st.sampled_from([(1, 1), (4, 4), (6, 2), (8, 1)]),
    "batch": st.sampled_from([1, 2]),
    "scale": st.sampled_from([0.1, -0.1, 0.0]),
    "cuts": st.lists(SIZES, max_size=2),
    "at": st.tuples(SIZES, SIZES, st.sampled_from([1, 3])),
    "bounds": st.none() | st.lists(st.integers(0, 800), max_size=4),
    "dtype": st.sampled_from([torch.bfloat16, torch.float16]),
}


def causal(n, heads, widths, dtype):
    """A whole causal square."""
    sizes = {"num_rows": n, "num_cols": n, "heads": heads, "widths": widths, "batch": 2}
    where = {"band": Band(None, 0), "scale": 0.1, "cuts": [], "at": (0, 0, 1), "bounds": None}
    return {**sizes, **where, "dtype": dtype}


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@settings(max_examples=6)  # nearly each compiles kernels of its own
@given(**DRAWN)
def test_triton_equals_the_reference(widths, **drawn):
    check("triton", widths=widths, **drawn)


@pytest.mark.parametrize("implementation", ["aten", "cudnn", "flash_attn"])
@settings(max_examples=150)
@given(widths=st.sampled_from(WIDTHS), **DRAWN)
@example(**causal(300, (4, 4), (128, 128), torch.bfloat16))
@example(**causal(256, (8, 1), (64, 64), torch.float16))
@example(**causal(257, (6, 2), (128, 128), torch.bfloat16) | {"band": Band(), "cuts": [100]})
@example(**causal(300, (4, 4), (96, 128), torch.float16) | {"band": Band(-50, 0), "bounds": [90]})
def test_ops_equal_the_reference(implementation, **drawn):
    check(implementation, **drawn)


def check(
    implementation, band, num_rows, num_cols, heads, widths, batch, scale, cuts, at, bounds, dtype
):
    (hq, hkv), (d, vd) = heads, widths
    documents = () if bounds is None else (Ranges.documents((0, *sorted(bounds))),)
    block = Block(band, Score(scale), *at, terms=documents)
    q = normal(0, batch, num_rows, hq, d, dtype=dtype)
    k = normal(1, batch, num_cols, hkv, d, dtype=dtype)
    v = normal(2, batch, num_cols, hkv, vd, dtype=dtype)
    dout = normal(3, batch, num_rows, hq, vd, dtype=dtype)
    reason = refusal(implementation, Request.of(q, v, block.acting))
    if reason is not None and "not installed" in reason:
        pytest.skip(reason)
    assume(reason is None)
    if not cuts and scale > 0 and num_rows and num_cols:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, block, implementation=implementation)
        grads = torch.autograd.grad(out, leaves, dout)
        apart = attended(implementation, q, k, v, dout, block, [0, num_cols])
        for x, y in zip((out, lse, *grads), apart, strict=True):
            x, y = x.float(), y.float()
            top = y.where(torch.isfinite(y), 0.0).abs().amax()
            bound = 2 * torch.finfo(dtype).eps * top + 1e-4
            torch.testing.assert_close(x, y, rtol=0, atol=float(bound))
    ends = [0, *sorted(min(c, num_cols) for c in cuts), num_cols]
    got = attended(implementation, q, k, v, dout, block, ends)
    whole = [0, num_cols]
    in_this = attended("reference", q, k, v, dout, block, whole)
    exact = attended("reference", *(x.double() for x in (q, k, v, dout)), block, whole)
    assert [x.dtype for x in got] == [dtype] + [torch.float32] * 4
    for name, x, other, y in zip(
        ("out", "lse", "dq", "dk", "dv"), got, in_this, exact, strict=True
    ):
        if not y.numel():
            continue
        shown = torch.isfinite(y)
        assert torch.equal(torch.isfinite(x), shown), name
        x, other, y = x.double()[shown], other.double()[shown], y[shown]
        if not y.numel():
            continue
        # The op rounds p, ds and what it returns, where the reference rounds out.
        bound = 2 * (other - y).abs().max() + 4 * torch.finfo(dtype).eps * y.abs().max() + 1e-4
        assert (x - y).abs().max() <= bound, f"{name} off by {(x - y).abs().max()} of {bound}"
