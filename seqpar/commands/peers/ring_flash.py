"""ring-flash-attn: its zigzag ring, on torch's op for the CPU where flash-attn is not installed."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor

from seqpar.commands.peers import one_device
from seqpar.commands.peers.one_device import Attend


def zigzag(causal: bool) -> Attend:
    """Attention of all ranks of this process."""
    attend = _module().zigzag_ring_flash_attn_func
    return lambda q, k, v: attend(q, k, v, causal=causal)


@cache
def _module() -> Any:
    stand_ins: dict[str, ModuleType] = {}
    if find_spec("flash_attn") is None:
        part = ModuleType("flash_attn.flash_attn_interface")
        part._flash_attn_forward = _flash_attn_forward  # type: ignore[attr-defined]
        part._flash_attn_backward = _flash_attn_backward  # type: ignore[attr-defined]
        stand_ins = {"flash_attn": ModuleType("flash_attn"), part.__name__: part}
    # Importing the package imports its adapters, which want what transformers no longer has.
    found = find_spec("ring_flash_attn")
    assert found is not None, "only what is installed is made"
    package = ModuleType("ring_flash_attn")
    package.__path__ = [*(found.submodule_search_locations or ())]
    stand_ins["ring_flash_attn"] = package
    with patch.dict(sys.modules, stand_ins):  # for this import alone
        return import_module("ring_flash_attn.zigzag_ring_flash_attn")


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, **_: Any
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = one_device.forward(q, k, v, causal=causal, scale=softmax_scale)
    return out.transpose(1, 2), lse, None, None


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, softmax_scale: float | None = None, causal: bool = False, **_: Any,
) -> None:  # fmt: skip
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    gradients = one_device.backward(
        dout, q, k, v, out, softmax_lse, causal=causal, scale=softmax_scale
    )
    for into, x in zip((dq, dk, dv), gradients, strict=True):
        into.copy_(x.transpose(1, 2))
