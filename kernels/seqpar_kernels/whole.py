"""A block that is all there is, or the first of several: what one call of an op gives is used as it is.

The sums of `dispatch` are the other way, where several blocks have to be put together.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels import aten
from seqpar_kernels.block import Block
from seqpar_kernels.choice import Implementation
from seqpar_kernels.dispatch import attend, finish
from seqpar_kernels.flash import ADAPTERS, Adapter, without_launches
from seqpar_kernels.partial import Partial, without_autocast
from seqpar_kernels.watching import Unlaunched, watcher
from seqpar_kernels.way import is_only_told, nothing_to_do, spreads, way_of


def attend_whole(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]]:
    """(out, lse) of a block that holds all the keys of its rows.

    What an op gives in one call is the result. Else it goes the way of every block: sums that are begun,
    continued and finished.
    """
    # docs/design.md: a block that is all there is gives what the op gives
    found = _in_one_call(q, k, v, block, implementation)
    if found is not None and block.score.joined() is None:
        out, lse = found
        return out.to(q.dtype), lse
    running = _begun(found, q, k, v, block, implementation)
    return finish(running, q.dtype, block.score, implementation=implementation)


def begin(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    *,
    implementation: Implementation | None = None,
    finite: bool | None = None,
) -> Partial:
    """The running sums of rows after the first block that they meet: as `attend` into the identity.

    What an op gives in one call is not merged with nothing: the sums begin with it, to the same bits where
    scores are finite.
    """
    found = _in_one_call(q, k, v, block, implementation, finite)
    return _begun(found, q, k, v, block, implementation, finite)


def _begun(
    found: tuple[Tensor, Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: Block,
    implementation: Implementation | None,
    finite: bool | None = None,
) -> Partial:
    """The sums after a first block, of which one call may have given (out, lse)."""
    if found is not None:
        out, lse = found
        return Partial(out.to(lse.dtype), lse, torch.ones_like(lse))
    running = Partial.empty(q, v.shape[-1])
    attend(q, k, v, block, into=running, implementation=implementation, finite=finite, begins=True)
    return running


def _in_one_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: Block,
    implementation: Implementation | None,
    finite: bool | None = None,
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of a block, if one call of an op gives them."""
    way = _whole_way(q, k, v, block, implementation)
    if way is None:
        return None
    with without_autocast(q.device):
        if spreads(way, q, k, v, finite=finite):
            return None
        found = way.forward_whole(q, k, v, block)
    if found is not None:
        is_only_told("forward", q, k, block)
    return found


def attend_whole_backward(
    dout: Float[Tensor, "b i hq vd"],
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    out: Float[Tensor, "b i hq vd"],
    lse: Float[Tensor, "b i hq"],
    block: Block,
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(dq, dk, dv) of such a block in the type of q, or `None` where one call of an op does not give them."""
    if block.score.joined() is not None:
        return None
    way = _whole_way(q, k, v, block, implementation)
    if way is None:
        return None
    with without_autocast(q.device):
        if spreads(way, q, k, v, dout, out):
            return None
        found = way.backward_whole(dout, q, k, v, out, lse, block)
    if found is not None:
        is_only_told("backward", q, k, block)
    return found


def _whole_way(
    q: Tensor, k: Tensor, v: Tensor, block: Block, implementation: Implementation | None
) -> ModuleType | Adapter | None:
    """What has a `forward_whole` and a `backward_whole` and may be asked."""
    told = watcher()
    if nothing_to_do(q, k, block):
        return None
    if told is not None and not told.walks:
        return None
    way = way_of(q, v, block, implementation)
    if isinstance(way, Unlaunched):
        adapter = None if implementation is None else ADAPTERS.get(implementation)
        return None if adapter is None else without_launches(adapter)
    return way if way is aten or isinstance(way, Adapter) else None
