"""Softmax of stored scores in pieces, merging and finishing of partials: torch's softmax in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar_kernels import Partial, Score, finish, row_softmax

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = pytest.mark.parametrize(
    ("implementation", "dtype", "close"),
    [
        ("reference", torch.float64, 1e-13),
        ("triton", torch.float32, 2e-6),
        ("triton", torch.bfloat16, 2e-2),
    ],
)


def normal(*shape, dtype, seed=0):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).to(DEVICE)


def cut(num_cols, cuts):
    ends = [0, *sorted(min(c, num_cols) for c in cuts), num_cols]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


@WAYS
@given(
    leading=st.tuples(*[st.integers(1, 3)] * 3),
    num_cols=st.integers(1, 40) | st.just(1500),
    cuts=st.lists(st.integers(0, 40), max_size=2),
    hidden=st.sampled_from(["none", "some", "a row"]),
)
@settings(max_examples=20)
def test_equals_softmax_of_whole_rows(
    implementation, dtype, close, leading, num_cols, cuts, hidden
):
    """Each piece of columns as on a device of its own; maxima, sums and deltas continue."""
    s, dp = normal(*leading, num_cols, dtype=dtype), normal(*leading, num_cols, dtype=dtype, seed=1)
    if hidden == "some":
        s[..., ::3] = -torch.inf
    if hidden == "a row":
        s[0, 0, 0] = -torch.inf
    s, dp = s.transpose(0, 1), dp.transpose(0, 1)  # any strides of the leading dims
    pieces, how = cut(num_cols, cuts), {"implementation": implementation}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    m = torch.full(s.shape[:3], -torch.inf, dtype=wide, device=DEVICE)
    l, delta = torch.zeros_like(m), torch.zeros_like(m)
    for piece in pieces:
        row_softmax.add_sums_(s[..., piece], m, l, **how)
    p = [row_softmax.weights(s[..., piece], m, l, dtype, **how) for piece in pieces]
    for p_t, piece in zip(p, pieces, strict=True):
        row_softmax.add_dot_(p_t, dp[..., piece], delta, **how)
    ds = [
        row_softmax.score_gradient(p_t, dp[..., piece], delta, **how)
        for p_t, piece in zip(p, pieces, strict=True)
    ]

    exact = s.double()
    seen = (exact > -torch.inf).any(-1, keepdim=True)
    want = torch.softmax(torch.where(seen, exact, 0.0), -1) * seen
    want_ds = want * (dp.double() - (want * dp.double()).sum(-1, keepdim=True))
    torch.testing.assert_close(torch.cat(p, -1).double(), want, rtol=0, atol=close)
    torch.testing.assert_close(torch.cat(ds, -1).double(), want_ds, rtol=0, atol=5 * close)
    lse = torch.where(seen[..., 0], torch.logsumexp(torch.where(seen, exact, 0.0), -1), 0.0)
    got = torch.where(l > 0, torch.log(l) + m, 0.0).double()
    torch.testing.assert_close(got, lse, rtol=0, atol=1e-13 if wide == torch.float64 else 2e-6)


@pytest.mark.parametrize("sinking", [False, True])
def test_finish_in_one_kernel_equals_torch(sinking):
    acc, l = normal(2, 5, 3, 24, dtype=torch.float32), normal(2, 5, 3, dtype=torch.float32).exp()
    m = normal(2, 5, 3, dtype=torch.float32, seed=1)
    m[0, 0], l[0, 0], acc[0, 0] = -torch.inf, 0.0, 0.0
    sinks = normal(3, dtype=torch.float32, seed=2) if sinking else None
    got = finish(Partial(acc, m, l), torch.float16, Score(sinks=sinks), implementation="triton")
    want = Partial(acc.clone(), m, l).finish(torch.float16, sinks)
    torch.testing.assert_close(got[0], want[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
    assert torch.isinf(got[1][0, 0]).all() != sinking
    assert (got[0][0, 0] == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_sink_of_minus_infinity_is_none(implementation):
    acc, m, l = torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    m[0, 0], l[0, 0], acc[0, 0] = -torch.inf, 0.0, 0.0
    parts = Partial(*(x.to(DEVICE) for x in (acc, m, l)))
    sinks = torch.tensor([-torch.inf], device=DEVICE)
    out, lse = finish(parts, torch.float32, Score(sinks=sinks), implementation=implementation)
    assert out[0, :, 0, 0].tolist() == [0.0, 1.0]
    assert lse[0, :, 0].tolist() == [-torch.inf, 0.0]


@pytest.mark.parametrize("weighted", [False, True])
def test_merge_in_one_kernel_equals_torch(weighted):
    from seqpar_kernels import triton_softmax

    def partial(seed):
        shape = 2, 5, 3
        return Partial(
            normal(*shape, 20, dtype=torch.float32, seed=seed),
            normal(*shape, dtype=torch.float32, seed=seed + 1),
            normal(*shape, dtype=torch.float32, seed=seed + 2).exp(),
        )

    one, other = partial(0), partial(3)
    one.acc[0, 1], one.m[0, 1], one.l[0, 1] = 0.0, -torch.inf, 0.0
    want = Partial(*(x.clone() for x in (one.acc, one.m, one.l)))
    extra = (other.l,) if weighted else ()
    want.merge_(other.acc, other.m, *extra)
    other.acc[1, 2], other.m[1, 2] = torch.nan, -torch.inf  # saw nothing: leaves the row alone
    before = [x[1, 2].clone() for x in (one.acc, one.m, one.l)]
    triton_softmax.merge_((one.acc, one.m, one.l), other.acc, other.m, *extra)
    for got, expected, kept in zip(
        (one.acc, one.m, one.l), (want.acc, want.m, want.l), before, strict=True
    ):
        assert torch.equal(got[1, 2], kept)
        got[1, 2] = expected[1, 2]
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
