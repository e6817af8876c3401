"""`attend`, `attend_backward` and `finish`: one block of query rows over one block of key rows.

Every strategy calls these and nothing else; here an implementation is chosen and launched.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels import aten, poison, reference
from seqpar_kernels.beginnings import ADDED, Begins, first_touches
from seqpar_kernels.block import Block
from seqpar_kernels.choice import Implementation, fuses
from seqpar_kernels.flash import Adapter
from seqpar_kernels.partial import Partial, without_autocast
from seqpar_kernels.rows import Learned, Rows, RunningGradients
from seqpar_kernels.score import Score
from seqpar_kernels.terms import Sums
from seqpar_kernels.tuning import KERNELS, tiles_for
from seqpar_kernels.way import is_only_told, is_triton, nothing_to_do, spreads, way_of


def attend(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    *,
    into: Partial,
    implementation: Implementation | None = None,
    finite: bool | None = None,
    begins: bool = False,
) -> None:
    """Attends one block of query rows over one block of key rows and continues `into`, in place.

    A row that sees nothing leaves `into` as it was, so masked blocks and empty tensors are legal and
    exact. Terms that join a row once are not added here but by `finish`.

    Args:
        block: what the rows see, and the score with its scale resolved.
        into: the running sums of these rows, float32 or wider; never normalised between blocks.
        implementation: `None` chooses, see `choose`.
        finite: whether q, k and v are known to be finite; `None` looks.
        begins: whether `into` holds nothing yet: it is then written, all of it.

    Raises:
        ValueError: hq is not a multiple of hkv.
        NotImplementedError: the implementation cannot do what is asked.
    """
    if nothing_to_do(q, k, block) or is_only_told("forward", q, k, block):
        if begins:
            into.reset_()
        return
    with without_autocast(q.device):
        way = way_of(q, v, block, implementation)
        if is_triton(way):
            way.forward(q, k, v, block, into, begins=begins)
            return
        if begins:
            into.reset_()
        if spreads(way, q, k, v, finite=finite):
            poison.attend(way.forward, q, k, v, block, into)
        else:
            way.forward(q, k, v, block, into)


def attend_backward(
    rows: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    *,
    into: RunningGradients,
    learned: Learned | None = None,
    sums: Sums = (),
    implementation: Implementation | None = None,
    finite: bool | None = None,
    begins: Begins = ADDED,
) -> None:
    """Adds the block's share of (dq, dk, dv) to `into`, in place.

    Args:
        rows: the query rows with lse and delta over *all* their keys, not just this block's.
        into: dq `[b i hq d]`, dk `[b j hkv d]`, dv `[b j hkv vd]`, float32 or wider. dq may be `None`, or
            both dk and dv: not wanted, and not computed by kernels that can leave it out.
        learned: by name, what each row's share of the gradient of a term of the score is added to.
        sums: tensors whose gradients have their shape, with what those are added to.
        finite: whether rows, k and v are known to be finite; `None` looks.
        begins: whether dq, and whether dk and dv, hold nothing yet: they are then written, all of them.

    Raises:
        ValueError: hq is not a multiple of hkv, or just one of dk and dv is wanted.
        NotImplementedError: the implementation cannot do what is asked, or cannot differentiate lse
            and the rows say that it is.
    """
    if (into[1] is None) != (into[2] is None):
        raise ValueError("dk and dv come together: give both to add to, or None for both")
    if nothing_to_do(rows.q, k, block) or is_only_told("backward", rows.q, k, block):
        _begin_with_zeros(into, begins)
        return
    with without_autocast(rows.q.device):
        way = way_of(rows.q, v, block, implementation, lse_learns=rows.lse_learns)
        apart = spreads(way, rows.q, k, v, rows.dout, rows.delta, finite=finite)
        if not apart and (way is aten or isinstance(way, Adapter) or is_triton(way)):
            way.backward(rows, k, v, block, into, learned or {}, begins)
            return
        _begin_with_zeros(into, begins)
        # Only modules, `reference` and `flex`, are asked for what has such tensors.
        assert not isinstance(way, Adapter), "it has been asked"
        compute = partial(way.backward, sums=sums) if sums else way.backward
        if apart:
            poison.attend_backward(compute, rows, k, v, block, into, learned or {}, sums)
        else:
            compute(rows, k, v, block, into, learned or {})


def _begin_with_zeros(into: RunningGradients, begins: Begins) -> None:
    (dq, dk, dv), (begins_q, begins_kv) = into, begins
    first_touches([], dq, begins=begins_q)
    first_touches([], dk, dv, begins=begins_kv)


def finish(
    running: Partial,
    dtype: torch.dtype,
    score: Score,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]]:
    """Normalises: (out in `dtype`, lse). The partial is used up. See `Partial.finish`.

    Args:
        score: with the terms that join a row once, not with each of its blocks.
    """
    joined = score.joined()
    if fuses(running.acc, implementation):
        from seqpar_kernels import triton_softmax

        return triton_softmax.finish(running.acc, running.m, running.l, dtype, joined)
    return running.finish(dtype, joined)


def tile_border(
    implementation: Implementation, q: Float[Tensor, "b i hq d"], v: Float[Tensor, "b j hkv vd"]
) -> int | None:
    """The number of positions at whose multiples a sequence may be cut so that no bit changes.

    Keys are then visited from the last block to the first and continue one `Partial`, or dq; rows from
    the first to the last and continue dk, dv. `None` where the order of additions depends on the cut.
    """
    if implementation == "reference":
        return reference.TILE
    if implementation != "triton":
        return None
    tiles = [tiles_for(kernel, q, v) for kernel in KERNELS]
    return math.lcm(*(side for t in tiles for side in (t.rows, t.cols)))
