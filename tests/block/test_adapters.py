"""The adapters to FlashAttention-2, on a fake of its ops, equal the reference for any block."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from seqpar_kernels import Band, Block, Partial, Ranges, Rows, Score, flash_ops, reference
from seqpar_kernels.flash import ADAPTERS
from seqpar_kernels.windows import windows

BANDS = st.builds(Band, st.none() | st.integers(-75, 20), st.none() | st.integers(-20, 75))
SIZES = st.integers(0, 70)
CLOSE = {"rtol": 0, "atol": 1e-11}
REAL = SimpleNamespace(forward=flash_ops._forward, backward=flash_ops._backward)
REAL_CUDNN = SimpleNamespace(forward=flash_ops._cudnn, backward=flash_ops._cudnn_back)


def inside(nq, nk, left, right):
    """What the documentation says a window shows."""
    at = torch.arange(nq)[:, None] + nk - nq
    j = torch.arange(nk)
    seen = torch.ones(nq, nk, dtype=torch.bool)
    if left >= 0:
        seen &= j >= at - left
    if right >= 0:
        seen &= j <= at + right
    return seen


def shown(nq, nk, left, right):
    """What the kernel shows: it clips the sides first. The adapters must not depend on it."""
    wanted = inside(nq, nk, left, right)
    left, right = (-1 if side >= nk else side for side in (left, right))
    if left < 0 <= right:
        left = nk
    if right < 0 <= left:
        right = nk
    seen = inside(nq, nk, left, right)
    assert torch.equal(seen, wanted), (nq, nk, left, right)
    assert seen.any(1).all(), "a row sees nothing"
    return seen


def check(q, k, v, *like_q):
    for x in (q, k, v, *like_q):
        assert x.stride(-1) == 1
        starts = (x.storage_offset(), *x.stride()[:3])
        assert all(s % 8 == 0 for s in starts), "rows begin at multiples of 16 bytes"
        assert x.dtype == q.dtype
        assert x.shape[-1] == q.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert k.shape == v.shape
    assert all(x.shape == q.shape for x in like_q)
    assert q.shape[2] % k.shape[2] == 0


def scores(q, k, scale, softcap, seen):
    """(scores [b h i j], their derivative by scale * q.k)."""
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    slope = torch.ones_like(s)
    if softcap > 0:
        slope = 1 - torch.tanh(s / softcap) ** 2
        s = softcap * torch.tanh(s / softcap)
    return s.masked_fill(~seen, -torch.inf), slope


def fake_forward(q, k, v, scale, left, right, softcap):
    check(q, k, v)
    assert scale > 0
    wide = torch.promote_types(q.dtype, torch.float32)
    seen, group = shown(q.shape[1], k.shape[1], left, right), q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(group, 2) for x in (k, v))
    s, _ = scores(q.double(), k, scale, softcap, seen)
    out = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)
    return out.to(q.dtype), s.logsumexp(-1).to(wide)


def fake_backward(dout, q, k, v, out, lse, scale, left, right, softcap):
    check(q, k, v, out, dout)
    assert scale > 0
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.is_contiguous()
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    dtype, hkv = q.dtype, k.shape[2]
    seen, group = shown(q.shape[1], k.shape[1], left, right), q.shape[2] // hkv
    dout, q, k, v, out, lse = (x.double() for x in (dout, q, k, v, out, lse))
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    s, slope = scores(q, k, scale, softcap, seen)
    p = torch.exp(s - lse.unsqueeze(-1))
    delta = (out * dout).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("bihd,bjhd->bhij", dout, v) - delta) * slope * scale
    dq = torch.einsum("bhij,bjhd->bihd", ds, k)
    dk = torch.einsum("bhij,bihd->bjhd", ds, q).unflatten(2, (hkv, group)).sum(3)
    dv = torch.einsum("bhij,bihd->bjhd", p, dout).unflatten(2, (hkv, group)).sum(3)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, return_softmax,
):  # fmt: skip
    assert (dropout_p, causal, alibi_slopes, return_softmax) == (0.0, False, None, False)
    out, lse = fake_forward(q, k, v, softmax_scale, window_size_left, window_size_right, softcap)
    return out, lse, torch.empty(0), torch.empty(2)


def flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert (dropout_p, causal, alibi_slopes, rng_state) == (0.0, False, None, None)
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    grads = fake_backward(
        dout, q, k, v, out, softmax_lse, softmax_scale, window_size_left, window_size_right, softcap
    )
    for into, like, grad in zip((dq, dk, dv), (q, k, v), grads, strict=True):
        assert into.is_contiguous()
        assert (into.shape, into.dtype) == (like.shape, like.dtype)
        into.copy_(grad)
    return torch.empty(0)


def on_meta(op, *args, **kwargs):
    """Calls the real op without data: the arguments fit its schema, and the shapes come out."""
    return op(
        *tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, args), **kwargs
    )


def aten_sides(causal, left, right):
    """A causal mask is the window that is open to the left, and is always said as causal."""
    assert causal or (left, right) != (None, 0)
    assert not causal or (left, right) == (None, None)
    left, right = (-1 if side is None else side for side in (left, right))
    return left, 0 if causal else right


def aten_forward(*args, scale, window_size_left, window_size_right):
    sides = {"window_size_left": window_size_left, "window_size_right": window_size_right}
    like = on_meta(REAL.forward, *args, scale=scale, **sides)
    q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, causal, debug = args
    assert (cum_q, cum_k, dropout_p, debug) == (None, None, 0.0, False)
    assert (max_q, max_k) == (q.shape[1], k.shape[1])
    left, right = aten_sides(causal, window_size_left, window_size_right)
    out, lse = fake_forward(q, k, v, scale, left, right, 0.0)
    assert (out.shape, lse.shape) == (like[0].shape, like[1].shape)
    return out, lse, torch.empty(2), torch.empty(()), torch.empty(0)


def aten_backward(*args, scale, window_size_left, window_size_right):
    sides = {"window_size_left": window_size_left, "window_size_right": window_size_right}
    on_meta(REAL.backward, *args, scale=scale, **sides)
    dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, causal, _, _ = args
    assert (cum_q, cum_k, dropout_p) == (None, None, 0.0)
    assert (max_q, max_k) == (q.shape[1], k.shape[1])
    left, right = aten_sides(causal, window_size_left, window_size_right)
    return fake_backward(dout, q, k, v, out, lse, scale, left, right, 0.0)


def cudnn_forward(*args, scale):
    like = on_meta(REAL_CUDNN.forward, *args, scale=scale)
    q, k, v, bias, wants_lse, dropout_p, causal, debug = args
    assert k.shape[2] > 1, "cuDNN refuses one key of one query, torch one key of any"
    assert (bias, wants_lse, dropout_p, debug) == (None, True, 0.0, False)
    assert not causal or q.shape[2] == k.shape[2], "where another shape's mask hangs is not known"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = fake_forward(q, k, v, scale, -1, 0 if causal else -1, 0.0)
    out, lse = out.transpose(1, 2), lse.unsqueeze(-1)
    assert (out.shape, lse.shape) == (like[0].shape, like[1].shape)
    return out, lse, None, None, *like[4:6], torch.empty(()), torch.empty(()), None


def cudnn_backward(*args, scale):
    on_meta(REAL_CUDNN.backward, *args, scale=scale)
    dout, q, k, v, out, lse, _, _, bias, cum_q, cum_k, max_q, max_k, dropout_p, causal = args
    assert (bias, cum_q, cum_k, dropout_p) == (None, None, None, 0.0)
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    assert not causal or q.shape[2] == k.shape[2]
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    right = 0 if causal else -1
    grads = fake_backward(dout, q, k, v, out, lse.squeeze(-1), scale, -1, right, 0.0)
    return tuple(x.transpose(1, 2) for x in grads)


@pytest.fixture(scope="module", autouse=True)
def _fakes():
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward = flash_attn_forward
    interface._flash_attn_backward = flash_attn_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", package)
        patch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
        patch.setattr(flash_ops, "_forward", aten_forward)
        patch.setattr(flash_ops, "_backward", aten_backward)
        patch.setattr(flash_ops, "_cudnn", cudnn_forward)
        patch.setattr(flash_ops, "_cudnn_back", cudnn_backward)
        yield


def normal(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def attended(module, q, k, v, dout, block, ends):
    """(out, lse, dq, dk, dv), with the keys in hops between the ends."""
    hops = list(zip(ends[:-1], ends[1:], strict=True))
    running = Partial.identity(q, v.shape[-1])
    for a, b in reversed(hops):
        module.forward(q, k[:, a:b], v[:, a:b], block.at(0, a), running)
    out, lse = running.finish(q.dtype)
    rows = Rows.of(q, out, dout, lse)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
    for a, b in hops:
        into = dq, dk[:, a:b], dv[:, a:b]
        module.backward(rows, k[:, a:b], v[:, a:b], block.at(0, a), into, {})
    return out, lse, dq, dk, dv


@pytest.mark.parametrize("name", ADAPTERS)
@given(
    band=BANDS,
    num_rows=SIZES,
    num_cols=SIZES,
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2)]),
    widths=st.sampled_from([(8, 8), (5, 16), (16, 3), (12, 12)]),
    batch=st.sampled_from([1, 2]),
    scale=st.sampled_from([0.4, -0.3, 0.0]),
    softcap=st.none() | st.just(0.8),
    cuts=st.lists(SIZES, max_size=3),
    at=st.tuples(SIZES, SIZES, st.sampled_from([1, 3])),
    bounds=st.none() | st.lists(st.integers(0, 200), max_size=5),
)
@example(Band(None, 0), 70, 9, (1, 1), (8, 8), 1, 0.4, None, [], (0, 0, 1), None)
@example(Band(-60, None), 70, 9, (1, 1), (8, 8), 1, 0.4, None, [], (0, 0, 1), None)
@example(Band(-60, 3), 70, 9, (1, 1), (8, 8), 1, 0.4, None, [], (0, 0, 1), None)
@example(Band(-5, 0), 70, 70, (6, 2), (5, 16), 2, -0.3, 0.8, [33], (10, 0, 3), [30, 90, 200])
def test_equals_the_reference(
    name, band, num_rows, num_cols, heads, widths, batch, scale, softcap, cuts, at, bounds
):
    (hq, hkv), (d, vd) = heads, widths
    q, k = normal(0, batch, num_rows, hq, d), normal(1, batch, num_cols, hkv, d)
    v, dout = normal(2, batch, num_cols, hkv, vd), normal(3, batch, num_rows, hq, vd)
    score = Score(scale, softcap=softcap if name == "flash_attn" else None)
    documents = () if bounds is None else (Ranges.documents((0, *sorted(bounds))),)
    block = Block(band, score, *at, terms=documents)
    ends = [0, *sorted(min(c, num_cols) for c in cuts), num_cols]
    got = attended(ADAPTERS[name], q, k, v, dout, block, ends)
    expected = attended(reference, q, k, v, dout, block, [0, num_cols])
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


@given(band=BANDS, num_rows=SIZES, num_cols=SIZES)
@example(Band(None, 0), 70, 9)
@example(Band(-60, 3), 70, 9)
@example(Band(None, 3), 10, 10)
@example(Band(-3, 0), 13, 10)
def test_windows_hold_the_visible_scores_once_each(band, num_rows, num_cols):
    """Only a block that is taller than wide, with a row that sees all, is more than one window."""
    block, count = Block(band, Score(1.0)), torch.zeros(num_rows, num_cols, dtype=torch.int)
    parts = list(windows(block, num_rows, num_cols))
    for w in parts:
        nq, nk = w.rows.stop - w.rows.start, w.cols.stop - w.cols.start
        seen = shown(nq, nk, *(-1 if side is None else side for side in (w.left, w.right)))
        assert seen.any(0)[[0, -1]].all()
        count[w.rows, w.cols] += seen.int()
    visible = reference.visibility(band, num_rows, num_cols, torch.device("cpu"))
    assert torch.equal(count, visible.int())
    is_tall = visible.any(1).sum() > visible.any(0).sum()
    sees_all = visible[:, visible.any(0)].all(1).any()
    assert len(parts) <= (3 if is_tall and sees_all else 1)


@pytest.mark.parametrize("name", ADAPTERS)
def test_takes_any_strides(name):
    """Heads first, rows that begin anywhere, a last dim that is not contiguous, zero strides."""
    plain = [normal(n, 2, 20, 3, 8) for n in range(4)]
    wide = [torch.nn.functional.pad(x, (1, 4)) for x in plain]
    block, ends = Block(Band(None, 0), Score(0.4)), [0, 7, 20]
    expected = attended(reference, *plain, block, ends)
    for variant in (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain],
        [x[..., 1:9] for x in wide],
        [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in plain],
        [torch.stack((x, x), -1)[..., 0] for x in plain],
    ):
        for x, y in zip(attended(ADAPTERS[name], *variant, block, ends), expected, strict=True):
            torch.testing.assert_close(x, y, **CLOSE)
    plain[3] = torch.ones((), dtype=torch.float64).expand_as(plain[3])
    expected = attended(reference, *plain, block, ends)
    for x, y in zip(attended(ADAPTERS[name], *plain, block, ends), expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(name, dtype):
    """The op rounds what it returns: that may cost as much again as rounding out does, and once more."""
    q, k, v, dout = (normal(n, 1, 40, 2, 16, dtype=dtype) for n in range(4))
    block, ends = Block(Band(-30, 0), Score(0.2)), [0, 13, 40]
    got = attended(ADAPTERS[name], q, k, v, dout, block, ends)
    in_float32 = attended(reference, q, k, v, dout, block, ends)
    exact = attended(reference, *(x.double() for x in (q, k, v, dout)), block, ends)
    assert [x.dtype for x in got] == [dtype] + [torch.float32] * 4
    for x, other, y in zip(got, in_float32, exact, strict=True):
        bound = 2 * (other.double() - y).abs().max() + torch.finfo(dtype).eps * y.abs().max()
        assert (x.double() - y).abs().max() <= bound


@pytest.mark.parametrize("name", ADAPTERS)
def test_adds_to_what_is_wanted_and_refuses_a_delta_of_its_own(name):
    q, k, v, dout = (normal(n, 1, 20, 2, 8) for n in range(4))
    block, backward = Block(Band(None, 0), Score(0.4)), ADAPTERS[name].backward
    out, lse, *whole = attended(ADAPTERS[name], q, k, v, dout, block, [0, 20])
    for wanted in ((True, False, False), (False, True, True)):
        into = tuple(torch.zeros_like(q) if want else None for want in wanted)
        backward(Rows.of(q, out, dout, lse), k, v, block, into, {})
        for x, y in zip(into, whole, strict=True):
            assert x is None or torch.equal(x, y)
    with pytest.raises(AssertionError, match="never come here"):
        backward(Rows.of(q, out, dout, lse, lse), k, v, block, tuple(whole), {})


def test_flash_attn_is_deterministic_on_request():
    q, k, v, dout = (normal(n, 1, 5, 1, 8) for n in range(4))
    torch.use_deterministic_algorithms(True)
    try:
        attended(ADAPTERS["flash_attn"], q, k, v, dout, Block(Band(), Score(0.2)), [0, 5])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ADAPTERS)
@given(
    band=BANDS,
    num_rows=st.integers(1, 70),
    num_cols=st.integers(1, 70),
    heads=st.sampled_from([(4, 4), (6, 2)]),
    widths=st.sampled_from([(8, 8), (5, 16), (16, 3)]),
    scale=st.sampled_from([0.4, -0.3, 0.0]),
    bounds=st.none() | st.lists(st.integers(0, 70), max_size=2),
)
@example(Band(None, 0), 40, 40, (6, 2), (5, 16), 0.4, None)
@example(Band(None, 0), 1, 1, (4, 4), (8, 8), 0.4, None)  # which cuDNN refuses
@example(Band(None, 0), 40, 30, (4, 4), (8, 8), 0.4, None)
@example(Band(None, 5), 30, 40, (4, 4), (8, 8), 0.4, None)
def test_a_block_that_is_all_there_is(name, band, num_rows, num_cols, heads, widths, scale, bounds):
    """What one call of the op gives is given, or nothing is."""
    (hq, hkv), (d, vd) = heads, widths
    q, k = normal(0, 1, num_rows, hq, d), normal(1, 1, num_cols, hkv, d)
    v, dout = normal(2, 1, num_cols, hkv, vd), normal(3, 1, num_rows, hq, vd)
    documents = () if bounds is None else (Ranges.documents((0, *sorted(bounds))),)
    block, adapter = Block(band, Score(scale), terms=documents), ADAPTERS[name]
    want_out, want_lse, *want = attended(adapter, q, k, v, dout, block, [0, num_cols])
    parts, whole = list(windows(block, num_rows, num_cols)), slice(0, num_rows)
    results = adapter.forward_whole(q, k, v, block)
    assert (results is not None) == (len(parts) == 1 and parts[0].rows == whole)
    if results is not None:
        torch.testing.assert_close(results, (want_out, want_lse), **CLOSE)
    grads = adapter.backward_whole(dout, q, k, v, want_out, want_lse, block)
    has_all = len(parts) == 1 and (parts[0].rows, parts[0].cols) == (whole, slice(0, num_cols))
    assert (grads is not None) == (has_all and scale > 0)
    if grads is not None:
        torch.testing.assert_close(grads, tuple(want), **CLOSE)
        assert [x.dtype for x in grads] == [q.dtype] * 3
