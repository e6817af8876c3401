"""A whole call of attention as two torch ops, forward and backward, for `torch.compile`.

The compiler sees `seqpar::sharded_attention` and its backward, never the messages inside. Ops take tensors,
numbers and text, so a plan goes in as text and the group by its name. What forward has computed and received
comes out besides the results, for backward to play from a `Tape`; autograd does the rest, inside the op.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seqpar.comm import Grid, Group, Tape, once, silent
from seqpar.layout import Layout, Mask
from seqpar.strategies import HEAD_STRATEGIES, STRATEGIES, Plan, agree_on_call, check_call, resolve
from seqpar_kernels import Dropout, Score, torch_internals
from seqpar_kernels.torch_ops import define

# Tensors, then the plan. What may be a symbol while the compiler looks on is an argument of its own.
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? alibi_slopes, Tensor? sinks, str group, str plan, "
    "bool causal, int? window, int[]? documents, float? scale, float? softcap, float dropout, "
    "SymInt seed, int head_chunks, bool[] learning, bool with_lse"
)


def is_traced() -> bool:
    """Whether the compiler looks on here. `torch.compiler.is_compiling` would say so on all threads."""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(out, lse if asked for) as the strategies give them, as one op of the graph that is being compiled."""
    score = plan.score
    learned = (q, k, v, score.alibi_slopes, score.sinks)
    learning = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in learned]
    results = torch.ops.seqpar.sharded_attention(*learned, *_described(plan), learning, with_lse)
    if not with_lse:
        return results[0], None
    out, lse = results[:2]
    return out, lse.reshape(out.shape[:3])


def _num_results(strategy: str, *, with_lse: bool) -> int:
    """How many results a strategy has: some give lse though nobody asked."""
    return 2 if with_lse or strategy not in HEAD_STRATEGIES else 1


def _described(plan: Plan) -> tuple[Any, ...]:
    """The plan but for its tensors, as the ops take it. Traced, so it makes no object."""
    score, mask, drop = plan.score, plan.mask, plan.dropout
    keys = "None" if plan.kv_layout is None else repr(plan.kv_layout.code)
    grid = "None" if plan.grid is None else plan.grid.code
    text = (
        f"({plan.strategy!r}, {plan.implementation!r}, {plan.invariant!r}, {plan.layout.code!r}, "
        f"{keys}, {grid}, {plan.first_head})"
    )
    documents = None if mask.documents is None else list(mask.documents)
    p, seed = (0.0, 0) if drop is None else (drop.p, drop.seed)
    return (
        plan.group.name, text, mask.causal, mask.window, documents, score.scale, score.softcap, p,
        seed, plan.head_chunks,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _decoded(text: str) -> tuple[Any, ...]:
    strategy, implementation, invariant, layout, keys, grid, first = ast.literal_eval(text)
    keys = None if keys is None else Layout.decoded(keys)
    return strategy, implementation, invariant, Layout.decoded(layout), keys, grid, first


def _plan(group: Group, slopes: Tensor | None, sinks: Tensor | None, *described: Any) -> Plan:
    """The plan that was `_described`, but for the name of its group."""
    text, causal, window, documents, scale, softcap, p, seed, head_chunks = described
    strategy, implementation, invariant, layout, keys, grid, first = _decoded(text)
    return Plan(
        group,
        layout,
        Mask(causal, window, documents),
        Score(scale, softcap, slopes, sinks),
        strategy,
        implementation,
        Dropout(p, seed) if p else None,
        keys,
        invariant,
        None if grid is None else Grid(group, grid),
        head_chunks,
        first,
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    group: str,
    *args: Any,
) -> list[Tensor]:
    *described, learning, with_lse = args
    plan = _plan(Group.named(group), slopes, sinks, *described)

    def step() -> tuple[Tensor, ...]:
        agreed = agree_on_call(q, k, v, plan, with_lse=with_lse, learning=tuple(learning))
        tape = Tape()
        with torch.no_grad(), tape.record():
            results = STRATEGIES[agreed.strategy](q, k, v, agreed, with_lse=with_lse)
        return tuple(_listed(tape, results, (q, k, v), keeps=any(learning)))

    return list(once(step))  # for checkpointing around compiled code


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    group: str,
    *args: Any,
) -> list[Tensor]:
    torch_internals.parts(torch_internals.COMPILE)  # refused here where they are missing
    *described, learning, with_lse = args
    described[-3:-1] = 0.0, 0  # dropped or not, shapes are the same
    real = Group.named(group)
    plan = _plan(silent(real.rank, real.size), slopes, sinks, *described)
    try:
        plan = check_call(q, k, v, plan, with_lse=with_lse)
    except (TypeError, ValueError, NotImplementedError):
        # Not here, where this rank is alone: when it runs, the op is refused on all ranks.
        num = _num_results(plan.strategy, with_lse=with_lse)
        return [q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])][:num]
    if plan.strategy.startswith("materialised"):
        plan = replace(plan, implementation="reference")  # whose steps know tensors without content
    tape = Tape()
    with torch.no_grad(), tape.outline():
        results = STRATEGIES[plan.strategy](q, k, v, plan, with_lse=with_lse)
    return _listed(tape, results, (q, k, v), keeps=any(learning))


def _listed(
    tape: Tape, results: Sequence[Tensor | None], inputs: Sequence[Tensor], *, keeps: bool
) -> list[Tensor]:
    """The results, then what else is kept for backward, if anything; no tensor twice, and no input."""
    ends = [x for x in results if x is not None]
    kept = tape.tensors if keeps else []
    if kept and all(map(_same_storage, kept[-len(ends) :], ends)):
        kept, ends = kept[: -len(ends)], kept[-len(ends) :]
    listed: list[Tensor] = []
    for x in (*ends, *kept):
        is_there = any(_same_storage(x, y) for y in (*inputs, *listed))
        listed.append(x.clone() if is_there else x)
    return listed


def _same_storage(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage() is y.untyped_storage()


def _backward(
    grads: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    group: str,
    *args: Any,
) -> list[Tensor]:
    *described, learning, with_lse = args
    inputs = [None if x is None else x.detach() for x in (q, k, v, slopes, sinks)]
    wanted = [x for x, learns in zip(inputs, learning, strict=True) if learns]
    leaves = [x.requires_grad_() for x in wanted if x is not None]
    xs, (slopes, sinks) = inputs[:3], inputs[3:]
    plan = _plan(Group.named(group), slopes, sinks, *described)
    plan = resolve(plan, q, v, with_lse=with_lse)
    with torch_internals.differentiating():
        with Tape(kept).play():
            results = STRATEGIES[plan.strategy](*xs, plan, with_lse=with_lse)
        ends = results[: len(grads)]
        pairs = [(x, dx) for x, dx in zip(ends, grads, strict=True) if dx is not None]
        outs, douts = [x for x, _ in pairs], [dx.reshape(x.shape) for x, dx in pairs]
        found = torch.autograd.grad(outs, leaves, douts, allow_unused=True)
    given: list[Tensor] = []
    for x, dx in zip(leaves, found, strict=True):
        dx = torch.zeros_like(x) if dx is None else dx.contiguous()
        # Those of a single row of k and v came side by side, in one piece of memory.
        given.append(dx.clone() if any(_same_storage(dx, y) for y in given) else dx)
    return given


def _backward_fake(
    grads: Sequence[Tensor | None],  # noqa: ARG001
    kept: Sequence[Tensor],  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    *args: Any,
) -> list[Tensor]:
    inputs, learning = (q, k, v, slopes, sinks), args[-2]
    wanted = [x for x, learns in zip(inputs, learning, strict=True) if learns]
    return [x.new_empty(x.shape) for x in wanted if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, slopes, sinks, *ctx.call = inputs
    text, with_lse = ctx.call[1], ctx.call[-1]
    strategy, *_, layout, _, grid, _ = _decoded(text)
    num_results = _num_results(strategy, with_lse=with_lse)
    ctx.num_learning = 1 + with_lse  # an lse that nobody asked for has no gradient
    ctx.mark_non_differentiable(*output[ctx.num_learning :])
    # Heads that were traded are all that backward looks at; of its own rows it needs the shape.
    num_trading = layout.size if grid is None else len(grid[0])
    ctx.traded = strategy in HEAD_STRATEGIES and num_trading > 1
    ctx.shapes = [x.shape for x in (q, k, v)]
    own = () if ctx.traded else (q, k, v)
    kept = *output[num_results:], *output[:num_results]  # in the order of the tape
    ctx.save_for_backward(slopes, sinks, *own, *kept)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    slopes, sinks, *tensors = ctx.saved_tensors
    if ctx.traded:
        own = [tensors[0].new_empty(()).expand(shape) for shape in ctx.shapes]
        kept = tensors
    else:
        own, kept = tensors[:3], tensors[3:]
    found = torch.ops.seqpar.sharded_attention_backward(
        list(grads[: ctx.num_learning]), kept, *own, slopes, sinks, *ctx.call
    )
    there = iter(found)
    return (
        *(next(there) if learns else None for learns in ctx.call[-2]),
        *(None for _ in ctx.call),
    )


# Ranks must send in one order: compilers may neither swap these ops nor leave one out.
define(
    "sharded_attention",
    f"({_ARGUMENTS}) -> Tensor[]",
    _forward,
    fake=_forward_fake,
    save=_save,
    differentiate=_differentiate,
    sends=True,
)
define(
    "sharded_attention_backward",
    f"(Tensor?[] grads, Tensor[] kept, {_ARGUMENTS}) -> Tensor[]",
    _backward,
    fake=_backward_fake,
    sends=True,
)
