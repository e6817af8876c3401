"""Which implementation serves what: on a GPU, that of the measurements in docs/benchmarks."""

from dataclasses import replace

import pytest
import torch

from seqpar import Group, Mask, Plan, zigzag
from seqpar.calls.invariance import invariant_implementation, is_invariant
from seqpar_kernels import Documents, Dropout, Request, choose, refusal
from seqpar_kernels.terms.softcap import Softcap

CUDA, BF16, F16, F32 = torch.device("cuda"), torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU of some capability."""

    def of(capability, cudnn=91300):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)

    return of


HOPPER, AMPERE = (9, 0), (8, 0)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "terms", "expected"),
    [
        (HOPPER, BF16, 128, (), "cudnn"),
        (HOPPER, F16, 64, (), "cudnn"),
        (HOPPER, BF16, 256, (), "cudnn"),
        (HOPPER, F32, 128, (), "triton"),
        (HOPPER, torch.float64, 128, (), "reference"),
        (HOPPER, BF16, 512, (), "reference"),
        (HOPPER, BF16, 128, (Documents,), "triton"),
        (HOPPER, BF16, 128, (Softcap,), "triton"),
        (HOPPER, BF16, 128, (Dropout, Documents), "triton"),
        (AMPERE, BF16, 128, (), "aten"),
        (AMPERE, BF16, 128, (Documents,), "triton"),
        ((10, 0), BF16, 128, (), "aten"),
        ((12, 0), BF16, 256, (), "triton"),  # FlashAttention-2 has no such backward there
    ],
)
def test_what_computes_on_a_gpu(gpu, capability, dtype, width, terms, expected):
    gpu(capability)
    assert choose(Request(CUDA, dtype, width, width, terms)) == expected


def test_cudnn_takes_wide_heads_where_it_can(gpu):
    wide = Request(CUDA, BF16, 256, 256)
    gpu(HOPPER, cudnn=90400)
    assert refusal("cudnn", wide) == "has no head dim above 128, got 256"
    assert choose(wide) == "aten"
    gpu((10, 0))
    assert refusal("cudnn", Request(CUDA, BF16, 192, 128)).startswith("has no head dim above 128")
    with pytest.raises(NotImplementedError, match="'cudnn' has no head dim above 128, got 192"):
        choose(Request(CUDA, BF16, 192, 192), "cudnn")


def test_reproducible_results_are_those_of_kernels_that_have_them(gpu):
    gpu(HOPPER)
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.empty(1, 1, 1, 128)
        assert choose(replace(Request.of(x, x, ()), device=CUDA, dtype=BF16)) == "triton"
    finally:
        torch.use_deterministic_algorithms(False)


def test_invariant_bits_are_asked_for_on_a_gpu(gpu):
    """There they would take slower kernels, and a call for each kv head."""
    gpu(HOPPER)
    plan = Plan(Group.alone(), zigzag(8, 1), Mask(causal=True), strategy="ulysses")
    on_gpu = Request(CUDA, BF16, 64, 64)
    assert not is_invariant(plan, on_gpu)
    assert is_invariant(plan, Request(torch.device("cpu"), BF16, 64, 64))
    asked = replace(plan, invariant=True)
    assert is_invariant(asked, on_gpu)
    assert invariant_implementation(asked, on_gpu) == "triton"
