"""A NaN or an infinity stays where it is seen: everything else has the bits that it has without it.

A failure in one implementation alone says that a product of it has a factor for what is hidden that is not
finite, or that such a factor was not put to zero. Poison that is lost was taken out and not put back.
"""

import pytest
import torch

from seqpar_kernels import (
    Band,
    Block,
    Partial,
    Ranges,
    Region,
    Rows,
    Score,
    attend,
    attend_backward,
    finish,
    finished_gradients,
    sum_rows,
)
from seqpar_kernels.finite import taken_out
from seqpar_kernels.row_softmax import score_gradient, weights

# Triton's interpreter runs on numpy, which warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:(All-NaN slice|invalid value):RuntimeWarning")

NAN, INF = float("nan"), float("inf")
HEADS, KV_HEADS, WIDTH = 4, 2, 16
LENGTHS = {"reference": 70, "aten": 300, "triton": 40}  # two tiles, or two strips of a window
DOCUMENTS = Ranges.documents((0, 9, 25))
PREFIX = Ranges(
    (Region(0, 9, 0, 9), Region(9, 20, 0, 20, upper=0), Region(23, 41, 20, 60, lower=-5))
)
BLOCKS = {
    "prefix and more": Block(Band(), Score(0.4), terms=(PREFIX,)),
    "documents, causal": Block(Band(None, 0), Score(0.4), terms=(DOCUMENTS,)),
    "documents": Block(Band(), Score(0.4), terms=(DOCUMENTS,)),
    "causal": Block(Band(None, 0), Score(0.4)),
    "window": Block(Band(-7, 2), Score(0.4)),
}
NAMES = ("q", "k", "v", "dout")


def device_of(implementation):
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


def inputs(implementation, batch=1):
    generator = torch.Generator().manual_seed(3)
    heads = dict(zip(NAMES, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True))
    shape, device = (batch, LENGTHS[implementation]), device_of(implementation)
    return {
        name: torch.randn(*shape, h, WIDTH, generator=generator).to(device)
        for name, h in heads.items()
    }


def results(implementation, block, tensors):
    """Out, lse, dq, dk, dv and each row's share of what is learned, of a block that is all there is."""
    q, k, v, dout = (tensors[name] for name in NAMES)
    running = Partial.identity(q, WIDTH)
    attend(q, k, v, block, into=running, implementation=implementation)
    out, lse = finish(running, q.dtype, block.score, implementation=implementation)
    rows = Rows.of(q, out, dout, lse, implementation=implementation)
    into = tuple(torch.zeros_like(x) for x in (q, k, v))
    learned = (
        {"alibi_slopes": torch.zeros_like(lse)} if block.score.alibi_slopes is not None else {}
    )
    attend_backward(rows, k, v, block, into=into, learned=learned, implementation=implementation)
    learned |= finished_gradients(block.score, lse, rows.delta, block.score.tensors)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *into), strict=True)) | learned


def poisoned(tensors, name, where, value):
    tensors = {**tensors, name: tensors[name].clone()}
    tensors[name][where] = value
    return tensors


def visible(block, n):
    """Who sees whom, written out from the definition."""
    ahead = torch.arange(n) - torch.arange(n)[:, None]
    seen = torch.ones(n, n, dtype=torch.bool)
    if block.band.lower is not None:
        seen &= ahead >= block.band.lower
    if block.band.upper is not None:
        seen &= ahead <= block.band.upper
    i, j = torch.arange(n)[:, None], torch.arange(n)
    for term in block.terms:
        inside = torch.zeros_like(seen)
        for r in term.regions:
            part = (i >= r.top) & (i < r.bottom) & (j >= r.left) & (j < r.right)
            inside |= part & (ahead >= r.lower) & (ahead <= r.upper)
        seen &= inside
    return seen


def reached(block, n, name, at):
    """By result, which positions poison at one position of an input reaches."""
    seen = visible(block, n)
    rows = torch.arange(n) == at if name in ("q", "dout") else seen[:, at]
    cols, none = seen[rows].any(0), torch.zeros(n, dtype=torch.bool)
    return {
        "out": none if name == "dout" else rows,
        "lse": rows if name in ("q", "k") else none,
        "dq": rows,
        "dk": cols,
        "dv": none if name == "v" else cols,
    }


CASES = [
    (implementation, mask, name, value)
    for implementation in LENGTHS
    for mask in BLOCKS
    for name in NAMES
    for value in (NAN, INF)
    # Triton is dear where it is interpreted.
    if implementation != "triton" or (value is NAN and mask in ("documents, causal", "window"))
]


@pytest.mark.parametrize(("implementation", "mask", "name", "value"), CASES)
def test_what_is_not_finite_stays_where_it_is_seen(implementation, mask, name, value):
    block, clean = BLOCKS[mask], inputs(implementation)
    n, at = LENGTHS[implementation], 13
    want = results(implementation, block, clean)
    got = results(implementation, block, poisoned(clean, name, (slice(None), at), value))
    for result, hit in reached(block, n, name, at).items():
        assert torch.equal(got[result][:, ~hit], want[result][:, ~hit]), result
        if value is NAN:
            assert got[result][:, hit].isnan().all(), f"{result} lost it"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", LENGTHS)
def test_other_heads_and_batch_elements_do_not_see_it(implementation, name):
    block, clean = BLOCKS["causal"], inputs(implementation, batch=2)
    head = clean[name].shape[2] - 1
    want = results(implementation, block, clean)
    got = results(implementation, block, poisoned(clean, name, (0, slice(None), head), NAN))
    for result, x in want.items():
        own = HEADS // KV_HEADS if x.shape[2] == HEADS and name in ("k", "v") else 1
        assert torch.equal(got[result][1], x[1]), f"{result} of the other batch element"
        assert torch.equal(got[result][0, :, :-own], x[0, :, :-own]), f"{result} of other heads"


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_what_a_head_learns_is_spoiled_by_that_head_alone(implementation):
    device = device_of(implementation)
    slopes, sinks = torch.linspace(0.1, 0.4, HEADS, device=device), torch.ones(HEADS, device=device)
    block = Block(Band(-7, 0), Score(0.4, 5.0, slopes, sinks), terms=(DOCUMENTS,))
    clean = inputs(implementation)
    want = results(implementation, block, clean)
    got = results(implementation, block, poisoned(clean, "dout", (0, 13, 1), NAN))
    for name in ("alibi_slopes", "sinks"):
        total = sum_rows(got[name])
        assert total[1].isnan()
        assert torch.equal(total[[0, 2, 3]], sum_rows(want[name])[[0, 2, 3]]), name


@pytest.mark.parametrize("implementation", ["reference", "aten"])
def test_entries_of_values_that_are_finite_stay_apart_from_those_that_are_not(implementation):
    clean = inputs(implementation)
    want = results(implementation, BLOCKS["causal"], clean)["out"]
    bad = poisoned(clean, "v", (0, 13, slice(None), 2), INF)
    got = results(implementation, BLOCKS["causal"], bad)["out"]
    assert torch.equal(got[..., :2], want[..., :2])
    assert torch.equal(got[..., 3:], want[..., 3:])


def test_sums_that_overflow_change_no_bit():
    clean, block, power = inputs("reference"), BLOCKS["documents, causal"], 2.0**119
    clean["v"] = clean["v"].abs()
    huge = {**clean, "v": clean["v"] * power}
    assert huge["v"].sum().isinf()
    want = results("reference", block, clean)["out"]
    assert torch.equal(results("reference", block, huge)["out"], want * power)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_stored_weights_of_a_row_that_is_nan_are_zero_where_it_sees_nothing(implementation):
    device = device_of(implementation)
    s = torch.tensor([[1.0, 2.0, -INF], [NAN, NAN, -INF]], device=device)[None, None]
    m, l = torch.tensor([2.0, NAN], device=device), torch.tensor([1.3, NAN], device=device)
    m, l = (x[None, None] for x in (m, l))
    p = weights(s, m, l, torch.float32, implementation=implementation)[0, 0]
    assert p[:, 2].tolist() == [0, 0]
    assert p[1, :2].isnan().all()
    dp = torch.tensor([[0.5, NAN, 2.0], [1.0, 1.0, 2.0]], device=device)[None, None]
    delta = torch.tensor([0.0, NAN], device=device)[None, None]
    ds = score_gradient(p[None, None], dp, delta, implementation=implementation)[0, 0]
    assert ds[:, 2].tolist() == [0, 0]
    assert ds[0, 0] == p[0, 0] * 0.5
    assert ds[0, 1].isnan()


@pytest.mark.parametrize(
    "made",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(2, 0, 3, 1)[..., :3],
        lambda x: x[..., 1:3],
        lambda x: x[:, ::2],
        lambda x: x[:, :1].expand(-1, 4, -1, -1),
        lambda x: x.as_strided((2, 3, 4), (4, 2, 1)),
    ],
)
def test_what_is_taken_out_leaves_the_strides(made):
    """Products of tensors that lie otherwise add in another order, where they do not share memory."""
    x = made(torch.randn(4, 5, 6, 7))
    x[(0,) * x.ndim] = torch.nan
    clean, bad = taken_out(x)
    assert torch.equal(bad, x.isnan())
    assert torch.equal(clean, x.nan_to_num(nan=0.0))
    shares = x.stride() in {(210, 0, 7, 1), (4, 2, 1)}
    assert (clean.stride() == x.stride()) != shares
