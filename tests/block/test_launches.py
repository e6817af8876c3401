"""What compiled kernels must not depend on, of which the interpreter knows nothing."""

import inspect
from contextlib import nullcontext
from itertools import product

import pytest
import torch

from seqpar_kernels import triton_attention, triton_backward, triton_forward, triton_softmax
from seqpar_kernels.triton_attention import SWIZZLED, padded_widths

WIDTHS = (1, 8, 16, 17, 24, 40, 64, 80, 96, 128, 192, 256)


@pytest.mark.parametrize(("d", "vd"), [*product(WIDTHS, WIDTHS)])
def test_tiles_of_q_k_and_v_have_one_swizzle(d, vd):
    """Below 64 elements of 16 bits a tile's width is its swizzle."""
    wide_d, wide_vd = padded_widths(d, vd)
    assert wide_d >= d
    assert wide_vd >= vd
    assert wide_d == wide_vd or min(wide_d, wide_vd) >= SWIZZLED
    assert padded_widths(vd, d) == (wide_vd, wide_d)
    if d == vd:
        assert wide_d < 2 * max(d, 8.5)


def given(function):
    """The arguments of a kernel that are no constants."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if "constexpr" not in str(p.annotation)}


def unseen(kernel):
    """The arguments by which a kernel is not specialised."""
    if hasattr(kernel, "params"):  # compiled
        return {p.name for p in kernel.params if p.do_not_specialize}
    return set(kernel.kwargs["do_not_specialize"] or ())


def test_kernels_that_add_what_they_load_are_the_same_whatever_strides_are():
    """How a tile lies in registers follows from what is known of strides, and the order of sums from that."""
    summing = []
    for name, kernel in vars(triton_softmax).items():
        if name == "aligned_dot_kernel":  # see below
            continue
        if name.endswith("_kernel") and "tl.sum(" in inspect.getsource(kernel.fn):
            summing.append(name)
            assert unseen(kernel) == given(kernel.fn), name
    assert summing == ["dot_kernel", "sums_kernel"]
    # Of these only products are added, whose tiles lie as the product gives them.
    for module in (triton_forward, triton_backward):
        assert inspect.getsource(module).count("tl.sum(") == (module is triton_forward)


def test_the_device_is_changed_where_it_is_another(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert isinstance(triton_attention._current(torch.device("cuda", 1)), nullcontext)
    assert isinstance(triton_attention._current(torch.device("cuda", 0)), torch.cuda.device)
    assert isinstance(triton_attention._current(torch.device("cpu")), nullcontext)


@pytest.mark.parametrize("width", [16, 24, 32, 40])
def test_the_width_alone_decides_how_rows_are_loaded(width, monkeypatch):
    """Where it tells that rows are aligned, they are: else they are copied to be so."""
    launched, real = [], triton_softmax.launch

    def recorded(kernel, num_programs, on, x, y, total, *args, **constants):
        launched.append((kernel, x, y))
        real(kernel, num_programs, on, x, y, total, *args, **constants)

    monkeypatch.setattr(triton_softmax, "launch", recorded)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = torch.randn(2, 9, 3, 2 * width + 1, device=device)
    for heads, start, rows in product(
        (1, 3), (0, 1, width), (slice(0, 9), slice(2, 5), slice(0, 0))
    ):
        x, y = (z[:, rows, :heads, start : start + width] for z in (wide, wide.flip(0)))
        if heads == 1 and start == 1:  # contiguous, and yet not where or as is needed
            x = torch.randn(1 + x.numel(), device=device)[1:].view(x.shape)
            y = y.contiguous().as_strided(y.shape, (*y.contiguous().stride()[:2], 7, 1))
        total = torch.zeros(x.shape[:3], device=device)
        launched.clear()
        triton_softmax.add_dot_(x, y, total)
        torch.testing.assert_close(total, (x * y).sum(-1))
        for kernel, *pair in launched:
            aligned = kernel is triton_softmax.aligned_dot_kernel
            assert aligned == (width % 16 == 0)
            for z in pair if aligned else ():
                assert z.data_ptr() % 16 == 0
                assert all(stride % 16 == 0 for stride in z.stride()[:3])
