"""`attention` and `attention_with_lse`: the functional form of every strategy; `merge`, of their results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar import compiled
from seqpar.calls import agree_on_call, resolve
from seqpar.calls.options import told_of
from seqpar.comm import WayBack, agreed_backward, current_replay
from seqpar.strategies import STRATEGIES, Plan


def attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b slk hkv d"],
    v: Float[Tensor, "b slk hkv vd"],
    plan: Plan,
) -> Float[Tensor, "b sl hq vd"]:
    """This rank's rows of softmax(scale q k^T + mask) v over the whole sequence. All ranks must call.

    Equal to one-device attention for any number of ranks, any length and any head counts, gradients
    of q, k and v included. Query head h uses kv head h // (hq // hkv). A rank may hold no rows. Under
    `torch.autocast` q, k and v, but for float64, become its type, as in torch's own attention. Where
    gradients are wanted all ranks must go backward through out, even those whose rows do not count
    (weigh them with 0): their keys may count elsewhere. Derivatives are of first order: a backward with
    `create_graph=True` is refused.

    Raises:
        TypeError: an argument is of the wrong kind, or a tensor not floating point.
        ValueError: shapes, devices, heads or rows do not fit together or do not fit the layout, or
            invariant bits were asked for that this strategy, layout or mask cannot give.
        NotImplementedError: the requested implementation cannot do what was asked.
        DesyncError: the ranks' calls differ, or another rank raised one of the above.
    """
    # docs/design.md: autocast casts once, at the public function
    q, k, v = cast_by_autocast(q, k, v)
    if compiled.is_traced():
        return compiled.attention(q, k, v, plan)[0]
    plan = _agreed(q, k, v, plan)
    way = WayBack()
    with way.opened():
        out, _ = STRATEGIES[plan.strategy].attend(q, k, v, plan)
    return _watched(plan, way, out)[0]


def attention_with_lse(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b slk hkv d"],
    v: Float[Tensor, "b slk hkv vd"],
    plan: Plan,
) -> tuple[Float[Tensor, "b sl hq vd"], Float[Tensor, "b sl hq"]]:
    """As `attention`, and lse: the natural log of the sum of exp(score) of each row, sinks included.

    Both are differentiable. lse is float32 or wider; of a row that sees nothing, whose out is 0, it is -inf,
    or the sink where there is one. Raises what `attention` does.
    """
    q, k, v = cast_by_autocast(q, k, v)
    if compiled.is_traced():
        out, lse = compiled.attention(q, k, v, plan, with_lse=True)
        assert lse is not None, "it was asked for"
        return out, lse
    plan = _agreed(q, k, v, plan, with_lse=True)
    way = WayBack()
    with way.opened():
        out, lse = STRATEGIES[plan.strategy].attend(q, k, v, plan, with_lse=True)
    assert lse is not None, "it was asked for"
    out, lse = _watched(plan, way, out, lse)
    return out, lse


def cast_by_autocast(*xs: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in the type that autocast gives torch's own attention, if it is on for their device."""
    if not all(isinstance(x, Tensor) for x in xs):
        return xs  # to be refused on all ranks
    kind = xs[0].device.type
    # Tensors without content have none; torch.amp.is_autocast_available cannot be compiled by torch 2.11.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return xs
    dtype = torch.get_autocast_dtype(kind)
    casts = (x.is_floating_point() and x.dtype != torch.float64 for x in xs)
    return tuple(x.to(dtype) if cast else x for x, cast in zip(xs, casts, strict=True))


def _agreed(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, with_lse: bool = False) -> Plan:
    """The plan with its implementation; ranks need not agree once more on what they do not send."""
    replay = current_replay()
    if replay is not None and replay.mode == "play":
        replay.called(_call(plan, with_lse))
        return resolve(plan, q, v, with_lse=with_lse)
    agreed = agree_on_call(q, k, v, plan, with_lse=with_lse)
    if replay is not None:
        replay.called(_call(plan, with_lse))
    return agreed


def _watched(plan: Plan, way: WayBack, *results: Tensor) -> tuple[Tensor, ...]:
    """The results, with agreement on their backward unless the plan is trusted."""
    if plan.agree == "plan":
        return results
    return agreed_backward(results, plan.group, operation="attention", way=way)


def _call(plan: Plan, with_lse: bool) -> object:
    """What must be the same when a call is recomputed; its tensors are autograd's to watch."""
    return told_of(plan) | {"with_lse": with_lse}


def merge(
    parts: Sequence[tuple[Float[Tensor, "*rows vd"], Float[Tensor, "*rows"]]],
) -> tuple[Float[Tensor, "*rows vd"], Float[Tensor, "*rows"]]:
    """(out, lse) of the same query rows over all the keys that the parts have attended apart.

    Differentiable, and local: no rank is asked for anything. The parts must have disjoint keys, and at most
    one of them the sinks, which are in lse. Uses: a prefix that several sequences share, memory, caches.

    Raises:
        ValueError: no parts, or parts of different shapes.

    Source: Juravsky et al. 2024, Hydragen (arXiv:2402.05099), section 3.1, for shared prefixes.
    """
    shapes = {(tuple(out.shape), tuple(lse.shape)) for out, lse in parts}
    if len(shapes) != 1 or any(out[:-1] != lse for out, lse in shapes):
        raise ValueError(
            f"merge takes (out [.. vd], lse [..]) pairs of the same rows, got {sorted(shapes)}"
        )
    lses = torch.stack([lse for _, lse in parts])
    unseen = lses == -torch.inf
    finite = lses.masked_fill(unseen, torch.finfo(lses.dtype).min / 2)
    total = torch.logsumexp(finite, 0)
    weights = torch.exp(finite - total).masked_fill(unseen, 0.0)
    outs = (w.unsqueeze(-1) * out for w, (out, _) in zip(weights, parts, strict=True))
    return sum(outs).to(parts[0][0].dtype), total.masked_fill(unseen.all(0), -torch.inf)
