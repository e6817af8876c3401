"""Which implementation serves a call, and why the others do not.

Every implementation has one function here that says what it lacks. Nothing is tried and caught: a
call that passes `choose` runs, so ranks can agree on it before they communicate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from seqpar_kernels.profile import Kind, profile_of
from seqpar_kernels.terms import Ranges, Term
from seqpar_kernels.torch_internals import CPU_FLASH, CUDA_FLASH, CUDNN, missing
from seqpar_kernels.watching import watcher

Implementation = Literal["reference", "aten", "triton", "flash_attn", "cudnn", "flex"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
PREFERENCE: dict[str, tuple[Implementation, ...]] = {
    "cpu": ("aten", "reference"),  # triton interprets there, for tests
    "cuda": ("aten", "triton", "flash_attn", "reference"),
}
# What may stand under torch's flash op, the capabilities it is for, and the widest head it was tried with.
UNDER_TORCH = {"FA3": (((9, 0),), 256), "FA4": (((9, 0), (10, 0)), 128)}


@dataclass(frozen=True)
class Request:
    """What an implementation is asked to do.

    Args:
        lse: whether lse, too, is differentiated.
        repeats: whether torch is to give the same bits every time.
        is_dry: whether tensors have no device, as in a dry run.
        length: tokens that are attended at once; 0 is many.
        documents: packed in them; 0 is not known.
        windowed: whether a sliding window hides keys.
        flash: what stands under torch's flash op: "FA3", "FA4", or `None` for FlashAttention-2.
    """

    device: torch.device
    dtype: torch.dtype
    d: int
    vd: int
    terms: tuple[type[Term], ...] = ()
    lse: bool = False
    repeats: bool = False
    is_dry: bool = False
    length: int = 0
    documents: int = 0
    windowed: bool = False
    flash: str | None = None

    @staticmethod
    def of(
        q: Tensor,
        v: Tensor,
        terms: Iterable[Term],
        *,
        lse: bool = False,
        length: int = 0,
        windowed: bool = False,
    ) -> Request:
        """What a call with these terms asks for."""
        terms = tuple(terms)
        kinds = dict.fromkeys(type(term) for term in terms if term.acts and not term.joins)
        repeats = torch.are_deterministic_algorithms_enabled()
        return Request(
            q.device, q.dtype, q.shape[-1], v.shape[-1], tuple(kinds), lse, repeats, watcher() is not None,
            length, _documents(terms, length), windowed, flash_of(q),
        )  # fmt: skip


def flash_of(q: Tensor) -> str | None:
    """What stands under torch's flash op, where this tensor would go to it; see `Request`."""
    return current_flash_attention_impl() if q.device.type == "cuda" else None


# docs/design.md: what computes is asked for once
@lru_cache(256)
def choose(request: Request, requested: Implementation | None = None) -> Implementation:
    """The implementation that serves a request: the requested one, or the first that can.

    Raises:
        ValueError: no implementation has the requested name.
        NotImplementedError: the requested one cannot do it; the message names one that can.
    """
    if requested is not None and requested not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS} or None, got {requested!r}"
        )
    if request.is_dry:
        return requested or "reference"
    if request.dtype not in DTYPES:
        raise NotImplementedError(f"attention is computed in one of {DTYPES}, got {request.dtype}")
    # How long a sequence is refuses nothing, and may be new in every step.
    asked = replace(request, length=0, documents=0)

    def first_able() -> Implementation:
        return next(name for name in preference(request) if refusal(name, asked) is None)

    if requested is None:
        return first_able()
    reason = refusal(requested, asked)
    if reason is not None:
        raise NotImplementedError(
            f"implementation {requested!r} {reason}; {first_able()!r} does all that was asked"
        )
    return requested


def preference(request: Request) -> tuple[Implementation, ...]:
    """The implementations that are tried for a request, the fastest first."""
    names = PREFERENCE.get(request.device.type, ("reference",))
    is_cuda = request.device.type == "cuda"
    hides = any(kind.hides for kind in request.terms)
    if is_cuda and request.repeats:
        # Two runs of the backward of the others differ in the last bits of dq.
        return _led(("triton",), names)
    # docs/design.md: what computes was measured
    known = request.documents or not hides
    profile = profile_of(request.device) if known else None
    width, documents = max(request.d, request.vd), max(request.documents, 1)
    bits = 8 * request.dtype.itemsize
    kind = Kind(bits, width, request.length, documents, request.windowed)
    problem = None if profile is None else profile.nearest(kind)
    if problem is None:
        # The others take a call for each document.
        return _led(("triton",) if is_cuda and hides else (), names)
    return _led(problem.fastest, tuple(name for name in names if name not in problem.wrong))


def _led(first: tuple[str, ...], names: tuple[Implementation, ...]) -> tuple[Implementation, ...]:
    """The names with some before all others; a profile may tell of names that this version does not know."""
    led = [name for name in IMPLEMENTATIONS if name in first]
    led.sort(key=first.index)
    return tuple(dict.fromkeys((*led, *names)))


def _documents(terms: tuple[Term, ...], length: int) -> int:
    """How many documents are packed in so many tokens, by their mean length; 0 where that is not known."""
    for term in terms:
        if isinstance(term, Ranges) and length:
            return term.num_within(length)
    return 0


@lru_cache(256)
def refusal(name: Implementation, request: Request) -> str | None:
    """What the implementation lacks, as the end of a sentence that begins with its name, or `None`."""
    return _REFUSALS[name](request)


def needs_out(implementation: Implementation | None) -> bool:
    """Whether its backward derives delta from `out`, which rows then have to bring."""
    return implementation not in ("reference", "triton", "flex")


def fuses(x: Tensor, implementation: Implementation | None) -> bool:
    """Whether what surrounds the attention of x (delta, finishing, row softmax) runs in Triton."""
    if implementation == "triton":
        return True
    if x.device.type != "cuda" or implementation == "reference":
        return False
    return refusal("triton", Request(x.device, x.dtype, d=1, vd=1)) is None


def interprets() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _reference(request: Request) -> str | None:  # noqa: ARG001 - it can do everything
    return None


def _aten(request: Request) -> str | None:
    lacking = _lacks(request)
    on_cuda = request.device.type != "cpu"
    lacking = lacking or _absent(CUDA_FLASH if on_cuda else CPU_FLASH)
    if lacking or not on_cuda:
        return lacking
    if request.device.type == "cuda" and not torch.backends.cuda.is_flash_attention_available():
        return "has no FlashAttention in this build of torch"
    return _flash(request) or _under_torch(request)


def _under_torch(request: Request) -> str | None:
    """What FlashAttention-3 or 4 lacks, where the user has put it under torch's flash op."""
    if request.flash is None or request.device.type != "cuda":
        return None
    if request.flash not in UNDER_TORCH:
        return f"is {request.flash} under torch's flash op here, which was not tried"
    capabilities, widest = UNDER_TORCH[request.flash]
    whose = f"is {request.flash} under torch's flash op here, which"
    on = " and ".join(f"{major}.{minor}" for major, minor in capabilities)
    return _first(
        (
            _capability(request.device) not in capabilities,
            f"{whose} is for capability {on}",
        ),
        (max(request.d, request.vd) > widest, f"{whose} was tried for heads up to {widest} only"),
        (
            request.flash == "FA4" and request.windowed,
            f"{whose} has no backward for a window in torch 2.11 and was not tried with one since",
        ),
    )


def _flash_attn(request: Request) -> str | None:
    # The extension, since other packages share the name flash_attn.
    if not _is_installed("flash_attn_2_cuda"):
        return _flash(request) or "is not installed: pip install 'flash-attn>=2.7'"
    version = metadata.version("flash-attn")
    if tuple(int(x) for x in version.split(".")[:2]) < (2, 7):
        return f"needs flash-attn 2.7 or newer, got {version}"
    return _flash(request) or _lacks(request, "flash_attn")


def _cudnn(request: Request) -> str | None:
    if request.device.type == "cuda" and not torch.backends.cudnn.is_available():
        return "has no cuDNN in this build of torch"
    lacking = _aten(request) if request.device.type == "cuda" else _flash(request)
    if lacking is None and max(request.d, request.vd) > (widest := _widest(request.device)):
        return f"has no head dim above {widest}, got {_widths(request)}"
    return lacking or _absent(CUDNN)


def _widest(device: torch.device) -> int:
    """The widest head of cuDNN's attention, as torch's own choice has it."""
    on_hopper = torch.version.hip is None and _capability(device) == (9, 0)
    return 256 if on_hopper and (torch.backends.cudnn.version() or 0) >= 90501 else 128


def _flex(request: Request) -> str | None:
    device, dropping = request.device, [kind.words for kind in request.terms if kind.drops]
    narrowest = min(request.d, request.vd)
    return _first(
        (device.type != "cuda", f"does not run on {device.type}, where it has no backward"),
        (request.dtype == torch.float64, "accumulates in float32 and refuses float64"),
        (narrowest < 16, f"has no head dim below 16, got {_widths(request)}"),
        (bool(dropping), f"has no {', '.join(dropping)}"),
        (device.type == "cuda" and not _is_ampere(device), "needs compute capability 8.0 or newer"),
    )


def _triton(request: Request) -> str | None:
    device = request.device
    unknown = [kind.words for kind in request.terms if not kind.is_in_kernels()]
    here = "set TRITON_INTERPRET=1 before starting Python to run it on CPU tensors, for tests"
    return _first(
        (device.type not in ("cuda", "cpu"), f"does not run on {device.type}"),
        (request.dtype == torch.float64, "accumulates in float32 and refuses float64"),
        (max(request.d, request.vd) > 256, f"has no head dim above 256, got {_widths(request)}"),
        (bool(unknown), f"has no kernel for {', '.join(unknown)}"),
        (not _is_installed("triton"), "is not installed: pip install triton"),
        (device.type == "cpu" and not interprets(), f"needs a GPU ({here})"),
        (device.type == "cuda" and not _is_ampere(device), "needs compute capability 8.0 or newer"),
    )


def _flash(request: Request) -> str | None:
    """What FlashAttention-2 lacks, whoever brings it."""
    device = request.device
    if device.type != "cuda":
        return f"does not run on {device.type}"
    if torch.version.hip is not None:
        return "is not tested on AMD GPUs, where the op may ignore its window"
    widest, big = max(request.d, request.vd), ((8, 0), (9, 0))
    return _first(
        (request.dtype not in HALF, f"takes bfloat16 and float16 on cuda, not {request.dtype}"),
        (widest > 256, f"has no head dim above 256, got {_widths(request)}"),
        (not _is_ampere(device), "needs compute capability 8.0 or newer"),
        (
            widest > 192 and _capability(device) not in big,
            f"has a backward above head dim 192 on A100 and H100 only, got {_widths(request)}",
        ),
    )


def _lacks(request: Request, name: Implementation | None = None) -> str | None:
    """What a kernel lacks that does not know the place of a block, and derives delta from `out`.

    Args:
        name: of the implementation, if terms may say that its op takes them.
    """
    unknown = (kind for kind in request.terms if name not in kind.arguments)
    return _first(
        # What only hides is cut into parts, see `Block.parts`.
        *(
            (
                kind.changes_scores or kind.drops or kind.asks_each,
                kind.lacking or f"has no {kind.words}",
            )
            for kind in unknown
        ),
        (request.lse, "derives delta from out, and so cannot differentiate lse"),
    )


@cache  # to look for a package takes longer than all else that a call decides
def _is_installed(module: str) -> bool:
    return find_spec(module) is not None


def _absent(use: str) -> str | None:
    reason = missing(use)
    return reason and f"cannot be served: {reason}"


def _widths(request: Request) -> str:
    return f"{request.d} and {request.vd}" if request.d != request.vd else f"{request.d}"


_REFUSALS: dict[Implementation, Callable[[Request], str | None]] = {
    "reference": _reference,
    "aten": _aten,
    "triton": _triton,
    "flash_attn": _flash_attn,
    "cudnn": _cudnn,
    "flex": _flex,
}


def _first(*reasons: tuple[bool, str]) -> str | None:
    return next((text for holds, text in reasons if holds), None)


def _is_ampere(device: torch.device) -> bool:
    return torch.version.hip is not None or _capability(device) >= (8, 0)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
