"""One block, any band, keys in any number of hops, equals dense attention under the same mask."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from seqpar import Mask
from seqpar_kernels import (
    Band,
    Block,
    Dropout,
    Partial,
    Ranges,
    Request,
    Rows,
    Score,
    attend,
    attend_backward,
    choose,
)
from seqpar_kernels.terms import Term
from seqpar_kernels.terms.dropout import philox

HERE = ("reference", "aten")
SCORE = Score(0.4)
BANDS = st.builds(Band, st.none() | st.integers(-90, 20), st.none() | st.integers(-20, 90))


def device_of(implementation):
    """Where an implementation is tested: Triton compiles where there is a GPU, else it interprets."""
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


def dense(q, k, v, seen):
    """(out, lse); rows that see nothing give 0 and -inf."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bihd,bjhd->bihj", q, k) * SCORE.factor
    s = s.masked_fill(~seen[None, :, None, :], -math.inf)
    lse = s.logsumexp(-1)
    p = torch.where(seen[None, :, None, :], torch.exp(s - lse.unsqueeze(-1)), 0.0)
    return torch.einsum("bihj,bjhd->bihd", p, v), lse


def written_out(band, num_rows, num_cols):
    offset = torch.arange(num_cols)[None] - torch.arange(num_rows)[:, None]
    lower = -(10**9) if band.lower is None else band.lower
    upper = 10**9 if band.upper is None else band.upper
    return (offset >= lower) & (offset <= upper)


@pytest.mark.parametrize("implementation", HERE)
@given(
    band=BANDS,
    num_rows=st.integers(0, 150),
    num_cols=st.integers(0, 150),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (3, 1)]),
    widths=st.sampled_from([(8, 8), (5, 16), (16, 3)]),
    batch=st.sampled_from([1, 2]),
    cuts=st.lists(st.integers(0, 150), max_size=3),
)
@example(Band(None, 0), 0, 5, (4, 4), (8, 8), 1, [])
@example(Band(0, 0), 70, 70, (6, 2), (5, 16), 2, [64])
def test_equals_dense_forward_and_backward(
    implementation, band, num_rows, num_cols, heads, widths, batch, cuts
):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    (hq, hkv), (d, vd) = heads, widths
    q, k = normal(batch, num_rows, hq, d), normal(batch, num_cols, hkv, d)
    v, dout = normal(batch, num_cols, hkv, vd), normal(batch, num_rows, hq, vd)
    seen = written_out(band, num_rows, num_cols)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = dense(*leaves, seen)
    want_grads = torch.autograd.grad(want, leaves, dout)

    ends = [0, *sorted(min(c, num_cols) for c in cuts), num_cols]
    hops = list(zip(ends[:-1], ends[1:], strict=True))
    running = Partial.identity(q, vd)
    for a, b in reversed(hops):
        attend(
            q,
            k[:, a:b],
            v[:, a:b],
            Block(band, SCORE).at(0, a),
            into=running,
            implementation=implementation,
        )
    out, lse = running.finish()
    torch.testing.assert_close(out, want.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(lse, want_lse.detach(), rtol=0, atol=1e-11)

    rows = Rows.of(q, out, dout, lse)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for a, b in hops:
        into = dq, dk[:, a:b], dv[:, a:b]
        attend_backward(
            rows,
            k[:, a:b],
            v[:, a:b],
            Block(band, SCORE).at(0, a),
            into=into,
            implementation=implementation,
        )
    for got, expected in zip((dq, dk, dv), want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        (name, dtype)
        for name in (*HERE, "triton")
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        if (name, dtype) != ("triton", torch.float64)  # which it refuses
    ],
)
def test_any_strides_give_the_same_results(implementation, dtype):
    """Heads-first storage, a last dim that is not contiguous, and the zero strides of sum().backward()."""
    x = torch.randn(4, 2, 3, 20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.to(device_of(implementation))
    plain = [t.transpose(1, 2).contiguous() for t in x]
    plain[3] = torch.ones_like(plain[3])
    heads_first = [t.transpose(1, 2) for t in x]
    heads_first[3] = x.new_ones(()).expand_as(plain[3])
    width_first = [t.mT.contiguous().mT for t in plain]
    assert width_first[0].stride(-1) != 1

    def run(q, k, v, dout):
        running = Partial.identity(q, 8)
        attend(q, k, v, Block(Band(None, 0), SCORE), into=running, implementation=implementation)
        out, lse = running.finish()
        into = tuple(torch.zeros(t.shape, dtype=out.dtype, device=q.device) for t in (q, k, v))
        rows = Rows.of(q, out.to(dtype), dout, lse, implementation=implementation)
        attend_backward(
            rows, k, v, Block(Band(None, 0), SCORE), into=into, implementation=implementation
        )
        return out, lse, *into

    for variant in (heads_first, width_first):
        for got, expected in zip(run(*variant), run(*plain), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", [*HERE, "triton"])
def test_what_is_not_wanted_is_left_out(implementation):
    """Dq alone, dk and dv alone: the same numbers as all together."""
    device = device_of(implementation)
    q, dout = torch.randn(2, 1, 40, 2, 8, device=device)
    k, v = torch.randn(2, 1, 40, 1, 8, device=device)
    slopes = None if implementation == "aten" else torch.tensor([0.1, 0.2], device=device)
    block = Block(Band(None, 0), Score(0.4, alibi_slopes=slopes))
    running = Partial.identity(q, 8)
    attend(q, k, v, block, into=running, implementation=implementation)
    out, lse = running.finish()
    rows = Rows.of(q, out, dout, lse, implementation=implementation)

    def backward(wants_dq, wants_dkdv, learns):
        into = tuple(
            torch.zeros_like(x) if wanted else None
            for x, wanted in ((q, wants_dq), (k, wants_dkdv), (v, wants_dkdv))
        )
        by_row = torch.zeros_like(lse) if learns else None
        learned = {} if by_row is None else {"alibi_slopes": by_row}
        attend_backward(
            rows,
            k,
            v,
            block,
            into=into,
            learned=learned,
            implementation=implementation,
        )
        return (*into, by_row)

    learns = slopes is not None
    whole = backward(True, True, learns)
    assert all(x is None or x.any() for x in whole)
    for wanted in ((True, False, False), (False, True, False), (False, True, learns)):
        for part, want in zip(backward(*wanted), whole, strict=True):
            assert part is None or torch.equal(part, want)
    with pytest.raises(ValueError, match="dk and dv come together"):
        attend_backward(rows, k, v, block, into=(None, torch.zeros_like(k), None))


@pytest.mark.parametrize("implementation", [*HERE, "triton"])
def test_a_value_of_width_one_in_any_strides(implementation):
    """Such a tensor calls itself contiguous whatever its last stride is."""
    device = device_of(implementation)
    q, k = torch.randn(2, 1, 20, 2, 8, device=device)
    v, dout = (x.permute(0, 2, 3, 1) for x in torch.randn(2, 1, 1, 20, 2, device=device))
    assert dout.stride(-1) != 1
    results = []
    for v_t, dout_t in ((v, dout), (v.clone(memory_format=torch.contiguous_format), dout)):
        running = Partial.identity(q, 1)
        attend(q, k, v_t, Block(Band(), SCORE), into=running, implementation=implementation)
        out, lse = running.finish()
        rows = Rows.of(q, out, dout_t, lse, implementation=implementation)
        into = tuple(torch.zeros(t.shape, device=device) for t in (q, k, v))
        attend_backward(
            rows, k, v_t, Block(Band(), SCORE), into=into, implementation=implementation
        )
        results.append((out, lse, *into))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implementation", HERE)
def test_rows_that_see_nothing_are_left_alone(implementation):
    q = torch.randn(1, 100, 2, 4)
    running = Partial.identity(q, 4)
    attend(q, q, q, Block(Band(None, -40), SCORE), into=running, implementation=implementation)
    out, lse = running.finish()
    assert (out[:, :40] == 0).all()
    assert (lse[:, :40] == -math.inf).all()
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse[:, 40:]).all()


def test_large_scores_do_not_overflow():
    q = torch.full((1, 70, 1, 4), 300.0)
    for implementation in HERE:
        running = Partial.identity(q, 4)
        attend(q, q, q, Block(Band(None, 0), SCORE), into=running, implementation=implementation)
        out, _ = running.finish()
        torch.testing.assert_close(out, q)


def test_a_normalised_part_and_a_running_one_merge_alike():
    q, k = torch.randn(2, 1, 9, 2, 4, dtype=torch.float64)
    whole, parts = Partial.identity(q, 4), Partial.identity(q, 4)
    attend(q, k, k, Block(Band(), SCORE), into=whole)
    for a, b in ((0, 4), (4, 9)):
        one = Partial.identity(q, 4)
        attend(q, k[:, a:b], k[:, a:b], Block(Band(), SCORE), into=one)
        if a:
            parts.merge_(*one.finish())
        else:
            parts.merge_(one.acc, one.m, one.l)
    for got, expected in zip(parts.finish(), whole.finish(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@dataclass(frozen=True)
class Halved(Term):
    """A term that is no entry of the list."""

    name, words = "halved", "halved scores"
    changes_scores = bends = True


@pytest.mark.parametrize("implementation", ["aten", "flash_attn", "triton"])
def test_a_term_that_is_not_listed_is_refused_by_those_that_do_not_know_it(implementation):
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    block = Block(Band(), SCORE, terms=(Halved(),))
    assert choose(Request.of(q, k, block.acting)) == "reference"
    with pytest.raises(NotImplementedError, match=rf"{implementation}' .*'reference' does all"):
        attend(q, k, k, block, into=Partial.identity(q, 4), implementation=implementation)


def test_unknown_or_unfit_implementations_are_refused():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert choose(Request(cpu, torch.bfloat16, 8, 8), None) == "aten"
    assert choose(Request(meta, torch.float32, 8, 8), None) == "reference"
    with pytest.raises(
        (ValueError, TypeError), match="fastest"
    ):  # the shape check comes first here
        choose(Request(cpu, torch.float32, 8, 8), "fastest")
    with pytest.raises(NotImplementedError, match="'reference' does all that was asked"):
        choose(Request(meta, torch.float32, 8, 8), "aten")
    with pytest.raises(NotImplementedError, match="refuses float64; 'aten' does all"):
        choose(Request(cpu, torch.float64, 8, 8), "triton")
    with pytest.raises(NotImplementedError, match="head dim above 256, got 320 and 8"):
        choose(Request(cpu, torch.float32, 320, 8), "triton")
    with pytest.raises(NotImplementedError, match=r"'aten' cannot drop .*'reference' does all"):
        choose(Request(cpu, torch.float32, 8, 8, (Dropout,)), "aten")
    with pytest.raises(NotImplementedError, match="float8"):
        choose(Request(cpu, torch.float8_e4m3fn, 8, 8), None)
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 2, 4)
    with pytest.raises(ValueError, match="multiple of hkv"):
        attend(q, k, k, Block(Band(), SCORE), into=Partial.identity(q, 4))


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (ValueError, "scale must be finite", lambda: Score(math.nan)),
        (TypeError, "scale must be a number", lambda: Score("1")),
        (ValueError, "softcap must be positive, got 0.0", lambda: Score(softcap=0)),
        (ValueError, "softcap must be positive", lambda: Score(softcap=-1.0)),
        (ValueError, "softcap must be finite", lambda: Score(softcap=math.inf)),
        (
            ValueError,
            r"sinks must be 1-D, \[hq\], got \(2, 1\)",
            lambda: Score(sinks=torch.ones(2, 1)),
        ),
        (TypeError, "alibi_slopes must be a floating", lambda: Score(alibi_slopes=torch.arange(2))),
        (TypeError, "alibi_slopes must be a floating", lambda: Score(alibi_slopes=[0.5])),
        (ValueError, r"p must be in \[0, 1\), got 1", lambda: Dropout(1, 0)),
        (ValueError, r"p must be in \[0, 1\), got -0.1", lambda: Dropout(-0.1, 0)),
        (ValueError, "seed must be in", lambda: Dropout(0.1, -1)),
        (TypeError, "seed must be an integer", lambda: Dropout(0.1, 1.5)),
        (ValueError, "boundaries from 0", lambda: Ranges.documents((1, 2))),
        (ValueError, "boundaries from 0", lambda: Mask(documents=[5, 9])),
        (ValueError, "boundaries from 0", lambda: Mask(documents=())),
        (ValueError, "boundaries from 0", lambda: Ranges.documents((0, 3, 2))),
        (TypeError, "integer boundaries", lambda: Ranges.documents((0, 1.5))),
    ],
)
def test_terms_that_mean_nothing_are_refused(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_dropout_is_the_published_generator():
    """Known answers of Philox 4x32 with 7 rounds, from the source's own test vectors."""
    zeros = [torch.zeros(1, dtype=torch.long)] * 4
    assert philox(0, *zeros).item() == 0x5F6FB709
    pi = [torch.tensor([x]) for x in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    assert philox(0x299F31D0A4093822, *pi).item() == 0x4DFCCABA
    kept = Dropout(0.25, 9).keeps(*zeros[:2], torch.arange(300)[:, None], torch.arange(300))
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / 90000) ** 0.5


def test_autocast_does_not_lower_the_precision_of_a_block():
    q = torch.randn(1, 40, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = Partial.identity(q, 8)
        attend(q, q, q, Block(Band(), SCORE), into=cast, implementation="reference")
    plain = Partial.identity(q, 8)
    attend(q, q, q, Block(Band(), SCORE), into=plain, implementation="reference")
    assert torch.equal(cast.finish()[0], plain.finish()[0])
