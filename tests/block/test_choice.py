"""Which implementation serves what: on a GPU, that of the measurements in docs/benchmarks."""

from dataclasses import replace

import pytest
import torch
from on_cuda import OnCuda

from seqpar import Group, Mask, Plan, attention, cli, contiguous, zigzag
from seqpar.calls import check_call, resolve
from seqpar.calls.check import _claim
from seqpar.calls.invariance import invariant_implementation, is_invariant
from seqpar.comm import silent
from seqpar_kernels import Dropout, Ranges, Request, choose, refusal
from seqpar_kernels.profile import (
    FOLDER,
    Kind,
    Problem,
    Profile,
    device_name,
    forget,
    path_of,
    profile_of,
)
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
        (HOPPER, BF16, 128, (Ranges,), "triton"),
        (HOPPER, BF16, 128, (Softcap,), "triton"),
        (HOPPER, BF16, 128, (Dropout, Ranges), "triton"),
        (AMPERE, BF16, 128, (), "aten"),
        (AMPERE, BF16, 128, (Ranges,), "triton"),
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


@pytest.mark.parametrize(
    ("length", "width", "documents", "windowed", "expected"),
    [
        (1024, 128, 1, False, "aten"),
        (2048, 128, 1, False, "cudnn"),  # as near to 1024 as to 4096
        (4096, 128, 1, False, "cudnn"),
        (1 << 20, 96, 1, False, "cudnn"),
        (4096, 128, 1, True, "aten"),
        (16384, 128, 4, False, "cudnn"),
        (16384, 128, 32, False, "triton"),
        (16384, 128, 32, True, "triton"),
        (1024, 64, 4, False, "aten"),
    ],
)
def test_what_was_fastest_of_the_nearest_measurement_computes(
    gpu, length, width, documents, windowed, expected
):
    gpu(HOPPER)
    terms = (Ranges,) if documents > 1 else ()
    asked = Request(
        CUDA, BF16, width, width, terms, length=length, documents=documents, windowed=windowed
    )
    assert choose(asked) == expected
    assert choose(replace(asked, repeats=True)) == "triton"
    gpu(AMPERE)
    choose.cache_clear()
    assert choose(asked) == ("triton" if terms else "aten"), "nothing was measured there"


def test_documents_are_counted_where_a_rank_attends():
    x = torch.empty(1, 4, 1, 8)
    packed = Ranges.documents(tuple(range(0, 131073, 2048)))  # 64 of them
    found = [Request.of(x, x, (packed,), length=n).documents for n in (131072, 16384, 64, 0)]
    assert found == [64, 8, 1, 0]
    assert Request.of(x, x, (), length=16384).documents == 0


@pytest.mark.parametrize(
    ("strategy", "expected"), [("ring", 5), ("allgather", 5), ("ulysses", 13), ("hybrid", 10)]
)
def test_all_ranks_choose_by_the_same_length(strategy, expected):
    """Of thirteen tokens one of three ranks holds five."""
    asked = []

    class Told(Request):
        @staticmethod
        def of(*args, length, **options):
            asked.append(length)
            return Request.of(*args, length=length, **options)

    def lengths(size):
        asked.clear()
        for rank in range(size):
            group = silent(rank, size)
            grid = group.grid(ulysses=2) if strategy == "hybrid" else None
            layout = contiguous(13, size) if size == 3 else contiguous(17, size)
            plan = Plan(group, layout, Mask(causal=True), strategy=strategy, grid=grid)
            x = torch.empty(1, layout.rows[rank], 4, 8)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("seqpar.calls.check.Request", Told)
                resolve(plan, x, x)
        return set(asked)

    assert lengths(4 if strategy == "hybrid" else 3) == {expected}


def test_what_stands_under_torchs_flash_op_is_known(gpu, monkeypatch):
    gpu(HOPPER)
    plain = Request(CUDA, BF16, 128, 128, length=1024, flash="FA4")
    assert choose(plain) == "aten"
    windowed = replace(plain, windowed=True)
    assert "FA4 under torch's flash op here, which has no backward for a window" in refusal(
        "aten", windowed
    )
    assert choose(windowed) == "triton"
    assert choose(replace(windowed, flash="FA3")) == "aten"
    wide = replace(plain, d=256, vd=256)
    assert "was tried for heads up to 128 only" in refusal("cudnn", wide), "its rest goes to the op"
    assert choose(wide) == "triton"
    assert "which was not tried" in refusal("aten", replace(plain, flash="FA5"))
    gpu(AMPERE)
    refusal.cache_clear()
    assert "is for capability" in refusal("aten", plain)
    monkeypatch.setattr("seqpar_kernels.choice.current_flash_attention_impl", lambda: "FA4")
    x = torch.empty(1, 1, 1, 8)
    assert Request.of(x, x, ()).flash is None, "it is asked of CUDA alone"


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A folder for profiles of this machine's CPU, and what writes one."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    cpu = torch.device("cpu")

    def write(wrong=(), **seconds):
        problem = Problem(Kind(32, 8, 16, 1, windowed=False), seconds, wrong)
        made = Profile(device_name(cpu), None, "a test", (problem,))
        made.write(path_of(made.device))
        forget()
        choose.cache_clear()
        return made

    return write


def chosen():
    plan = Plan(Group.alone(), contiguous(16, 1), Mask(causal=True))
    x = torch.randn(1, 16, 2, 8)
    return resolve(plan, x, x).implementation, attention(x, x, x, plan)


def test_the_users_own_profile_comes_first(own):
    by_default, out = chosen()
    assert by_default == "aten"
    made = own(reference=1.0, aten=2.0, unheard_of=0.5)
    assert profile_of(torch.device("cpu")) == made, "it is read as it was written"
    assert chosen()[0] == "reference"
    own(reference=2.0, aten=1.0)
    assert chosen()[0] == "aten"
    own(wrong=("aten",))
    assert chosen()[0] == "reference", "what gave wrong numbers here does not compute"
    own(reference=2.0, aten=1.0)
    asked = Request(torch.device("cpu"), F32, 8, 8, (Softcap,), length=16)
    assert choose(asked) == "reference", "what lacks something does not compute, however fast"
    assert choose(Request(torch.device("cpu"), BF16, 8, 8, length=16)) == "aten", (
        "of 16 bits it says nothing"
    )
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("text", ["{", "[]", '{"device": "x"}', '{"problems": [{"seconds": {}}]}'])
def test_what_is_no_profile_is_named(tmp_path, monkeypatch, text, capsys):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    path = path_of(device_name(torch.device("cpu")))
    path.write_text(text)
    (tmp_path / "of-another-device.json").write_text("not looked at")
    forget()
    with pytest.raises(ValueError, match=f"{path.name} is no profile of a device"):
        chosen()
    asked = Request(torch.device("cpu"), F32, 8, 8)
    assert choose(asked, "aten") == "aten", "who names what computes needs no profile"
    assert cli.main(["doctor", "--no-selfcheck"]) == 1
    assert "is no profile of a device" in capsys.readouterr().out
    path.unlink()
    path.mkdir()  # cannot be read
    forget()
    with pytest.raises(ValueError, match="is no profile of a device"):
        chosen()


def test_nobody_needs_a_home(monkeypatch):
    for name in (FOLDER, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/none")
    forget()
    assert profile_of(torch.device("cpu")) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(path_of("Some GPU X / Y (2)")) == "/elsewhere/seqpar/some-gpu-x-y-2.json"


def test_what_stands_under_torchs_flash_op_is_asked_in_every_call(gpu, monkeypatch):
    """And ranks compare it."""
    gpu(HOPPER)
    active = [None]
    monkeypatch.setattr("seqpar_kernels.choice.current_flash_attention_impl", lambda: active[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    plan = Plan(silent(0, 2), contiguous(4096, 2), Mask(causal=True, window=64))
    x = torch.empty(1, 2048, 2, 128, dtype=BF16)
    with OnCuda():
        assert check_call(x, x, x, plan).implementation == "aten"
        claims = _claim(x, x, x, plan, False, None)
        active[0] = "FA4"
        assert check_call(x, x, x, plan).implementation == "triton"
        assert _claim(x, x, x, plan, False, None) != claims
