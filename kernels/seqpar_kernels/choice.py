"""Which implementation serves a call, and why the others do not.

Every implementation has one function here that says what it lacks. Nothing is tried and caught: a
call that passes `choose` runs, so ranks can agree on it before they communicate.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from seqpar_kernels.documents import Documents
from seqpar_kernels.dropout import Dropout
from seqpar_kernels.score import Score

Implementation = Literal["reference", "aten", "triton", "flash_attn", "cudnn"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
PREFERENCE: dict[str, tuple[Implementation, ...]] = {
    "cpu": ("aten", "reference"),  # triton interprets there, for tests
    "cuda": ("triton", "aten", "flash_attn", "cudnn", "reference"),
}


@dataclass(frozen=True)
class Request:
    """What an implementation is asked to do."""

    device: torch.device
    dtype: torch.dtype
    d: int
    vd: int
    softcap: bool = False
    alibi: bool = False
    dropout: bool = False
    documents: bool = False

    @staticmethod
    def of(
        q: Tensor,
        v: Tensor,
        score: Score,
        dropout: Dropout | None = None,
        documents: Documents | None = None,
    ) -> Request:
        """What a call asks for."""
        return Request(
            q.device, q.dtype, q.shape[-1], v.shape[-1],
            score.softcap is not None, score.alibi_slopes is not None,
            dropout is not None, documents is not None,
        )  # fmt: skip


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
    if request.dtype not in DTYPES:
        raise NotImplementedError(f"attention is computed in one of {DTYPES}, got {request.dtype}")
    able = (name for name in preference(request.device) if refusal(name, request) is None)
    if requested is None:
        return next(able)
    reason = refusal(requested, request)
    if reason is not None:
        raise NotImplementedError(
            f"implementation {requested!r} {reason}; {next(able)!r} does all that was asked"
        )
    return requested


def preference(device: torch.device) -> tuple[Implementation, ...]:
    """The implementations that are tried on a kind of device, the fastest first."""
    return PREFERENCE.get(device.type, ("reference",))


def refusal(name: Implementation, request: Request) -> str | None:
    """What the implementation lacks, as the end of a sentence that begins with its name, or `None`."""
    return _REFUSALS[name](request)


def fuses(x: Tensor, implementation: Implementation | None) -> bool:
    """Whether what surrounds the attention of x (delta, finishing, row softmax) runs in Triton."""
    if implementation == "triton":
        return True
    here = x.device.type == "cuda" and implementation != "reference"
    return here and x.dtype != torch.float64 and find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _reference(request: Request) -> str | None:  # noqa: ARG001 - it can do everything
    return None


def _aten(request: Request) -> str | None:
    missing = _first(
        (request.softcap, "has no softcap"),
        (request.alibi, "does not add ALiBi on global positions"),
        (request.dropout, "cannot drop weights by their global position"),
    )
    if request.device.type == "cpu" or missing:
        return missing
    return _first(
        (request.device.type != "cuda", f"does not run on {request.device.type}"),
        (request.dtype not in HALF, f"takes bfloat16 and float16 on cuda, not {request.dtype}"),
        (
            max(request.d, request.vd) > 256,
            f"has no head dim above 256, got {request.d, request.vd}",
        ),
        (
            not torch.backends.cuda.is_flash_attention_available(),
            "has no FlashAttention in this build of torch",
        ),
    ) or _first((not _is_ampere(request.device), "needs compute capability 8.0 or newer"))


def _triton(request: Request) -> str | None:
    device = request.device
    here = "set TRITON_INTERPRET=1 before starting Python to run it on CPU tensors, for tests"
    return _first(
        (find_spec("triton") is None, "is not installed: pip install triton"),
        (device.type not in ("cuda", "cpu"), f"does not run on {device.type}"),
        (device.type == "cpu" and not interprets(), f"needs a GPU ({here})"),
        (request.dtype == torch.float64, "accumulates in float32 and refuses float64"),
        (
            max(request.d, request.vd) > 256,
            f"has no head dim above 256, got {request.d, request.vd}",
        ),
        (device.type == "cuda" and not _is_ampere(device), "needs compute capability 8.0 or newer"),
    )


def _flash_attn(request: Request) -> str | None:
    return _first(
        (request.device.type != "cuda", f"does not run on {request.device.type}"),
        (request.dtype not in HALF, f"takes bfloat16 and float16, not {request.dtype}"),
        (
            max(request.d, request.vd) > 256,
            f"has no head dim above 256, got {request.d, request.vd}",
        ),
        (request.alibi, "does not add ALiBi on global positions"),
        (request.dropout, "cannot drop weights by their global position"),
        # The extension, since other packages share the name flash_attn.
        (find_spec("flash_attn_2_cuda") is None, "is not installed: pip install 'flash-attn>=2.7'"),
    ) or _first((not _is_ampere(request.device), "needs compute capability 8.0 or newer"))


def _cudnn(request: Request) -> str | None:
    return _first(
        (request.device.type != "cuda", f"does not run on {request.device.type}"),
        (not torch.backends.cudnn.is_available(), "has no cuDNN in this build of torch"),
        (
            max(request.d, request.vd) > 128,
            f"has no head dim above 128, got {request.d, request.vd}",
        ),
    ) or _aten(request)  # which does what needs a window


_REFUSALS: dict[Implementation, Callable[[Request], str | None]] = {
    "reference": _reference,
    "aten": _aten,
    "triton": _triton,
    "flash_attn": _flash_attn,
    "cudnn": _cudnn,
}


def _first(*reasons: tuple[bool, str]) -> str | None:
    return next((text for holds, text in reasons if holds), None)


def _is_ampere(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
