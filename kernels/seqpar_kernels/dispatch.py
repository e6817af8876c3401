"""`attend`, `attend_backward` and `finish`: one block of query rows over one block of key rows.

Every strategy calls these and nothing else; here an implementation is chosen and launched.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels import aten, poison, reference
from seqpar_kernels.beginnings import ADDED, Begins, first_touches
from seqpar_kernels.block import Block
from seqpar_kernels.choice import Implementation, Request, choose, fuses
from seqpar_kernels.finite import may_hold_poison
from seqpar_kernels.flash import ADAPTERS, Adapter, without_launches
from seqpar_kernels.partial import Partial, without_autocast
from seqpar_kernels.rows import Learned, Rows, RunningGradients
from seqpar_kernels.score import Score
from seqpar_kernels.tuning import KERNELS, tiles_for
from seqpar_kernels.watching import Direction, Unlaunched, watcher


def attend(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    *,
    into: Partial,
    implementation: Implementation | None = None,
    finite: bool | None = None,
) -> None:
    """Attends one block of query rows over one block of key rows and continues `into`, in place.

    A row that sees nothing leaves `into` as it was, so masked blocks and empty tensors are legal and
    exact. Terms that join a row once are not added here but by `finish`.

    Args:
        block: what the rows see, and the score with its scale resolved.
        into: the running sums of these rows, float32 or wider; never normalised between blocks.
        implementation: `None` chooses, see `choose`.
        finite: whether q, k and v are known to be finite; `None` looks.

    Raises:
        ValueError: hq is not a multiple of hkv.
        NotImplementedError: the implementation cannot do what is asked.
    """
    if _nothing_to_do(q, k, block) or _is_only_told("forward", q, k, block):
        return
    with without_autocast(q.device):
        chosen = _chosen(q, v, block, implementation)
        if _spreads(chosen, q, k, v, finite=finite):
            poison.attend(chosen.forward, q, k, v, block, into)
        else:
            chosen.forward(q, k, v, block, into)


def attend_backward(
    rows: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    *,
    into: RunningGradients,
    learned: Learned | None = None,
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
        finite: whether rows, k and v are known to be finite; `None` looks.
        begins: whether dq, and whether dk and dv, hold nothing yet: they are then written, all of them.

    Raises:
        ValueError: hq is not a multiple of hkv, or just one of dk and dv is wanted.
        NotImplementedError: the implementation cannot do what is asked, or cannot differentiate lse
            and the rows say that it is.
    """
    if (into[1] is None) != (into[2] is None):
        raise ValueError("dk and dv come together: give both to add to, or None for both")
    if _nothing_to_do(rows.q, k, block) or _is_only_told("backward", rows.q, k, block):
        _begin_with_zeros(into, begins)
        return
    with without_autocast(rows.q.device):
        chosen = _chosen(rows.q, v, block, implementation, lse_learns=rows.lse_learns)
        spreads = _spreads(chosen, rows.q, k, v, rows.dout, rows.delta, finite=finite)
        if not spreads and (chosen is aten or isinstance(chosen, Adapter)):
            chosen.backward(rows, k, v, block, into, learned or {}, begins)
            return
        _begin_with_zeros(into, begins)
        if spreads:
            poison.attend_backward(chosen.backward, rows, k, v, block, into, learned or {})
        else:
            chosen.backward(rows, k, v, block, into, learned or {})


def _begin_with_zeros(into: RunningGradients, begins: Begins) -> None:
    (dq, dk, dv), (begins_q, begins_kv) = into, begins
    first_touches([], dq, begins=begins_q)
    first_touches([], dk, dv, begins=begins_kv)


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
    running = Partial.identity(q, v.shape[-1])
    attend(q, k, v, block, into=running, implementation=implementation, finite=finite)
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
        if _spreads(way, q, k, v, finite=finite):
            return None
        found = way.forward_whole(q, k, v, block)
    if found is not None:
        _is_only_told("forward", q, k, block)
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
        if _spreads(way, q, k, v, dout, out):
            return None
        found = way.backward_whole(dout, q, k, v, out, lse, block)
    if found is not None:
        _is_only_told("backward", q, k, block)
    return found


def _whole_way(
    q: Tensor, k: Tensor, v: Tensor, block: Block, implementation: Implementation | None
) -> ModuleType | Adapter | None:
    """What has a `forward_whole` and a `backward_whole` and may be asked."""
    told = watcher()
    if _nothing_to_do(q, k, block):
        return None
    if told is not None and not told.walks:
        return None
    way = _chosen(q, v, block, implementation)
    if isinstance(way, Unlaunched):
        return None if implementation is None else without_launches(ADAPTERS[implementation])
    return way if way is aten or isinstance(way, Adapter) else None


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


def _chosen(
    q: Tensor,
    v: Tensor,
    block: Block,
    implementation: Implementation | None,
    *,
    lse_learns: bool = False,
) -> ModuleType | Adapter | Unlaunched:
    """What has the `forward` and the `backward` of the implementation."""
    request = Request.of(q, v, block.acting, lse=lse_learns)
    name = choose(request, implementation)
    if name == "triton":  # lazily: importing seqpar must not need it
        from seqpar_kernels import triton_attention

        return triton_attention
    if name == "aten" and q.device.type != "cuda":
        return aten
    if watcher() is not None and name in ADAPTERS:
        return Unlaunched()
    return ADAPTERS.get(name, reference)


def _spreads(
    chosen: ModuleType | Adapter | Unlaunched, *tensors: Tensor, finite: bool | None = None
) -> bool:
    """Whether something that is not finite may be here and would reach what does not see it."""
    # docs/design.md: poison is taken out and put back
    if chosen not in (aten, reference):
        return False
    return may_hold_poison(*tensors) if finite is None else not finite


def _is_only_told(direction: Direction, q: Tensor, k: Tensor, block: Block) -> bool:
    """Tells of a block that is to be computed, in a dry run. Whether that is all."""
    told = watcher()
    if told is None:
        return False
    (b, i, hq, _), j, visible = q.shape, k.shape[1], 0
    for rows, cols in block.parts(i, j):
        band = block.band.at(rows.start, cols.start)
        visible += band.count(rows.stop - rows.start, cols.stop - cols.start)
    told.block(direction, i, j, b * hq * visible)
    return not told.walks


def _nothing_to_do(q: Tensor, k: Tensor, block: Block) -> bool:
    """Whether no row sees a key. Torch's CPU op dies of a division by zero on empty tensors."""
    hq, hkv = q.shape[2], k.shape[2]
    if q.shape[0] == 0 or hq == 0 or q.shape[1] == 0 or k.shape[1] == 0:
        return True
    if hkv == 0 or hq % hkv:
        raise ValueError(f"hq must be a multiple of hkv, got {hq=} {hkv=} (q {tuple(q.shape)})")
    return block.band.count(q.shape[1], k.shape[1]) == 0
