"""A whole call of attention as two torch ops, forward and backward, for `torch.compile`.

The compiler sees `seqpar::sharded_attention` and its backward, never the messages inside. Ops take tensors,
numbers and text, so a plan goes in as text and the group by its name. What forward has computed and received
comes out besides the results, for backward to play from a `Replay`; autograd does the rest, inside the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqpar.calls import agree_on_call, resolve
from seqpar.calls.check_tensors import check_tensors
from seqpar.calls.options import SCHEMA, read, written
from seqpar.comm import Group, Replay, agree_on_backward, backward_number, once, silent
from seqpar.compiled_shapes import LENGTHS, Outline, is_in_order, lengths_of
from seqpar.strategies import STRATEGIES, Plan
from seqpar_kernels import TENSORS, torch_internals
from seqpar_kernels.torch_ops import define

# Tensors, then what else a call is made of, see `options`.
# docs/design.md: compiled, a whole call is one op
_ARGUMENTS = (
    f"Tensor q, Tensor k, Tensor v, {', '.join(f'Tensor? {name}' for name in TENSORS)}, "
    f"str group, {SCHEMA}, {LENGTHS}, bool in_order, bool[] learning, bool with_lse"
)


@dataclass(frozen=True)
class _Call:
    """The arguments of the op, by name. The plan has its tensors."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    lengths: Sequence[Any]
    in_order: bool
    learning: tuple[bool, ...]
    with_lse: bool

    @staticmethod
    def of(args: Sequence[Any], group: Callable[[str], Group], *, content: bool = True) -> _Call:
        """The call of the op's arguments.

        Args:
            group: that of a name.
            content: whether tensors have any. Otherwise the plan has neither layouts nor a mask.
        """
        q, k, v, *rest = args
        tensors = dict(zip(TENSORS, rest, strict=False))
        name, *values, in_order, learning, with_lse = rest[len(TENSORS) :]
        told = iter(values)
        plan = read(group(name), told, content=content)
        plan = replace(plan, score=plan.score.with_tensors(tensors))
        return _Call(q, k, v, plan, (*told,), in_order, tuple(learning), with_lse)

    @property
    def num_results(self) -> int:
        """The number of results: some strategies give lse though nobody asked."""
        return 2 if self.with_lse or not STRATEGIES[self.plan.strategy].exchanges_heads else 1

    @property
    def is_numbered(self) -> bool:
        """Whether the last result is the number of its backward, which ranks then agree on."""
        several = self.plan.group.size > 1
        return any(self.learning) and several and self.plan.agree == "call"

    @property
    def exchanges(self) -> bool:
        """Whether ranks exchange rows for heads, which are then all that backward looks at."""
        grid = self.plan.grid
        size = self.plan.group.size if grid is None else grid.shape[1]
        return STRATEGIES[self.plan.strategy].exchanges_heads and size > 1

    def attend(self, plan: Plan) -> Sequence[Tensor | None]:
        """Attends by the strategy of a plan: (out, lse if there is one)."""
        attend = STRATEGIES[plan.strategy].attend
        return attend(self.q, self.k, self.v, plan, with_lse=self.with_lse)


def is_traced() -> bool:
    """Whether the compiler looks on here. `torch.compiler.is_compiling` would say so on all threads."""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attends as one op of the graph that is being compiled; gives (out, lse if asked for)."""
    # Not `plan.functions`: the compiler does not trace what is made once and kept.
    if plan.score.score_mod is not None or any(x.mask_mod is not None for x in plan.given_masks):
        raise NotImplementedError(
            "an op takes no functions: call attention with a score_mod or mask_mod outside of compiled code, "
            "as a function decorated with torch.compiler.disable does"
        )
    tensors = [getattr(plan.score, name) for name in TENSORS]
    inputs = (q, k, v, *tensors)
    learning = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]
    results = torch.ops.seqpar.sharded_attention(
        *inputs,
        plan.group.name,
        *written(plan),
        *lengths_of(plan),
        is_in_order(plan),
        learning,
        with_lse,
    )
    if not with_lse:
        return results[0], None
    out, lse = results[:2]
    return out, lse.reshape(out.shape[:3])


def _forward(*args: Any) -> list[Tensor]:
    call = _Call.of(args, Group.named)

    def step() -> tuple[Tensor, ...]:
        agreed = agree_on_call(
            call.q, call.k, call.v, call.plan, with_lse=call.with_lse, learning=call.learning
        )
        replay = Replay()
        with torch.no_grad(), replay.record():
            results = call.attend(agreed)
        listed = _listed(replay, results, call)
        if call.is_numbered:
            listed.append(torch.tensor(backward_number(call.plan.group)))
        return tuple(listed)

    return list(once(step))  # for checkpointing around compiled code


def _forward_fake(*args: Any) -> list[Tensor]:
    torch_internals.parts(torch_internals.COMPILE)  # refused here where they are missing
    call = _Call.of(args, _silent, content=False)
    q, k, v = call.q, call.k, call.v
    try:
        check_tensors(q, k, v)
        # docs/design.md: one graph serves all lengths
        outline = Outline.of(q, k, v, call.plan, call.lengths, in_order=call.in_order)
    except (TypeError, ValueError, NotImplementedError):
        # Not here, where this rank is alone: when it runs, the op is refused on all ranks.
        return [q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1])][
            : call.num_results
        ]
    q, k, v = outline.stand_ins(q, k, v)
    call, replay = replace(call, q=q, k=k, v=v), Replay()
    with torch.no_grad(), replay.outline():
        results = call.attend(outline.plan)
    listed = [outline.real(x) for x in _listed(replay, results, call)]
    return listed + [torch.empty((), dtype=torch.long)] * call.is_numbered


def _silent(name: str) -> Group:
    real = Group.named(name)
    return silent(real.rank, real.size)


def _listed(replay: Replay, results: Sequence[Tensor | None], call: _Call) -> list[Tensor]:
    """Lists the results, then what else is kept for backward, if anything; no tensor twice, and no input."""
    inputs = call.q, call.k, call.v
    ends = [x for x in results if x is not None]
    kept = replay.tensors if any(call.learning) else []
    # A strategy whose last step gives the results has them among what is kept: they are listed once.
    if kept and all(map(_same_storage, kept[-len(ends) :], ends)):
        kept, ends = kept[: -len(ends)], kept[-len(ends) :]
    listed: list[Tensor] = []
    for x in (*ends, *kept):
        is_there = any(_same_storage(x, y) for y in (*inputs, *listed))
        # In strides that do not depend on those of an input.
        listed.append(x.clone(memory_format=torch.contiguous_format) if is_there else x)
    return listed


def _same_storage(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage() is y.untyped_storage()


def _backward(
    grads: Sequence[Tensor | None], number: Tensor | None, kept: Sequence[Tensor], *args: Any
) -> list[Tensor]:
    num = 3 + len(TENSORS)
    inputs: list[Any] = [None if x is None else x.detach() for x in args[:num]]
    call = _Call.of((*inputs, *args[num:]), Group.named)
    if number is not None:
        agree_on_backward(call.plan.group, "attention", int(number), grads)
    learning = zip(inputs, call.learning, strict=True)
    leaves: list[Tensor] = [x.requires_grad_() for x, learns in learning if learns]
    plan = resolve(call.plan, call.q, call.v, with_lse=call.with_lse)
    with torch_internals.differentiating():
        with Replay(kept).play():
            results = call.attend(plan)
        ends = zip(results[: len(grads)], grads, strict=True)
        pairs = [(x, dx) for x, dx in ends if x is not None and dx is not None]
        outs, douts = [x for x, _ in pairs], [dx.reshape(x.shape) for x, dx in pairs]
        found = torch.autograd.grad(outs, leaves, douts, allow_unused=True)
    given: list[Tensor] = []
    for x, dx in zip(leaves, found, strict=True):
        dx = torch.zeros_like(x) if dx is None else dx.contiguous()
        # dk and dv of one row and head are contiguous parts of one message; an op gives no memory twice.
        given.append(dx.clone() if any(_same_storage(dx, y) for y in given) else dx)
    return given


def _backward_fake(
    grads: Sequence[Tensor | None],  # noqa: ARG001
    number: Tensor | None,  # noqa: ARG001
    kept: Sequence[Tensor],  # noqa: ARG001
    *args: Any,
) -> list[Tensor]:
    # The last two of `_ARGUMENTS` are learning and with_lse.
    learning = args[-2]
    wanted = [x for x, learns in zip(args, learning, strict=False) if learns]
    return [x.new_empty(x.shape) for x in wanted if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    num = 3 + len(TENSORS)
    call, output = _Call.of(inputs, Group.named, content=False), [*output]
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs[num:]]
    ctx.told_at = [n for n, x in enumerate(inputs[num:]) if isinstance(x, Tensor)]
    told = [inputs[num + n] for n in ctx.told_at]  # masks and layouts
    ctx.num_learning = 1 + call.with_lse  # an lse that nobody asked for has no gradient
    ctx.mark_non_differentiable(*output[ctx.num_learning :])
    # Of own rows that were exchanged backward needs the shape alone.
    ctx.exchanged, ctx.shapes = call.exchanges, [x.shape for x in inputs[:3]]
    own = () if ctx.exchanged else inputs[:3]
    number = output.pop() if call.is_numbered else None
    kept = *output[call.num_results :], *output[: call.num_results]  # in the order of the replay
    ctx.save_for_backward(number, *told, *inputs[3:num], *own, *kept)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    number, *rest = ctx.saved_tensors
    num = len(ctx.told_at)
    told, learned, tensors = rest[:num], rest[num : num + len(TENSORS)], rest[num + len(TENSORS) :]
    options = [*ctx.rest]
    for n, x in zip(ctx.told_at, told, strict=True):
        options[n] = x
    if ctx.exchanged:
        # Tensors of the right shapes that take no memory: their contents are not looked at.
        own = [tensors[0].new_empty(()).expand(shape) for shape in ctx.shapes]
        kept = tensors
    else:
        own, kept = tensors[:3], tensors[3:]
    found = torch.ops.seqpar.sharded_attention_backward(
        list(grads[: ctx.num_learning]), number, kept, *own, *learned, *options
    )
    there, learning = iter(found), ctx.rest[-2]
    return (
        *(next(there) if learns else None for learns in learning),
        *(None for _ in ctx.rest),
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
    f"(Tensor?[] grads, Tensor? number, Tensor[] kept, {_ARGUMENTS}) -> Tensor[]",
    _backward,
    fake=_backward_fake,
    sends=True,
)
