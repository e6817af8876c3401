"""What computes a block, and what about it must be known before."""

from __future__ import annotations

from types import ModuleType
from typing import TypeGuard

from torch import Tensor

from seqpar_kernels import aten, reference
from seqpar_kernels.block import Block
from seqpar_kernels.choice import Implementation, Request, choose
from seqpar_kernels.finite import may_hold_poison
from seqpar_kernels.flash import ADAPTERS, Adapter
from seqpar_kernels.watching import Direction, Unlaunched, watcher


def way_of(
    q: Tensor,
    v: Tensor,
    block: Block,
    implementation: Implementation | None,
    *,
    lse_learns: bool = False,
) -> ModuleType | Adapter | Unlaunched:
    """What has the `forward` and the `backward` of the implementation."""
    windowed = block.band.lower is not None
    request = Request.of(q, v, block.acting, lse=lse_learns, windowed=windowed)
    name = choose(request, implementation)
    if name == "triton":  # lazily: importing seqpar must not need it
        from seqpar_kernels import triton_attention

        return triton_attention
    if name == "aten" and q.device.type != "cuda":
        return aten
    if watcher() is not None and name in (*ADAPTERS, "flex"):
        return Unlaunched()
    if name == "flex":  # lazily: it brings the compiler
        from seqpar_kernels import flex

        return flex
    return ADAPTERS.get(name, reference)


def is_triton(way: ModuleType | Adapter | Unlaunched) -> TypeGuard[ModuleType]:
    """Whether its kernels are Triton's, which is imported only where they are."""
    return isinstance(way, ModuleType) and way.__name__ == "seqpar_kernels.triton_attention"


def spreads(
    chosen: ModuleType | Adapter | Unlaunched, *tensors: Tensor, finite: bool | None = None
) -> bool:
    """Whether something that is not finite may be here and would reach what does not see it."""
    # docs/design.md: poison is taken out and put back
    if chosen not in (aten, reference):
        return False
    return may_hold_poison(*tensors) if finite is None else not finite


def is_only_told(direction: Direction, q: Tensor, k: Tensor, block: Block) -> bool:
    """Tells of a block that is to be computed, in a dry run. Whether that is all."""
    told = watcher()
    if told is None:
        return False
    (b, i, hq, _), j = q.shape, k.shape[1]
    told.block(direction, i, j, b * hq * block.count(i, j))
    return not told.walks


def nothing_to_do(q: Tensor, k: Tensor, block: Block) -> bool:
    """Whether no row sees a key. Torch's CPU op dies of a division by zero on empty tensors."""
    hq, hkv = q.shape[2], k.shape[2]
    if q.shape[0] == 0 or hq == 0 or q.shape[1] == 0 or k.shape[1] == 0:
        return True
    if hkv == 0 or hq % hkv:
        raise ValueError(f"hq must be a multiple of hkv, got {hq=} {hkv=} (q {tuple(q.shape)})")
    return block.band.count(q.shape[1], k.shape[1]) == 0
