"""Backward is agreed on: ranks that do not go back together are told, all of them, and can go on."""

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import GradientEdge

import seqpar
from seqpar import simulate
from seqpar.comm import DesyncError
from seqpar.strategies import STRATEGIES

LENGTH, ODD = 12, 1  # the tokens, and the rank that does something else


class Layers:
    """Two layers of the same shapes on one rank, and what is wanted of them."""

    def __init__(self, group, strategy, **options):
        self.group, self.layout = group, seqpar.contiguous(LENGTH, group.size)
        grid = group.grid(ulysses=2) if STRATEGIES[strategy].needs_grid else None
        self.plan = seqpar.Plan(group, self.layout, strategy=strategy, grid=grid, **options)
        whole = torch.randn(
            2, 3, 1, LENGTH, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        self.mine = [[self.shard(x) for x in layer] for layer in whole]

    def shard(self, x):
        x = seqpar.shard_sequence(x, self.layout, self.group.rank)
        return x.clone().requires_grad_()

    def loss(self, layer):
        return seqpar.attention(*self.mine[layer], self.plan).pow(2).sum()

    def gradients(self):
        """Those of both layers, one after the other."""
        return [torch.autograd.grad(self.loss(n), self.mine[n]) for n in range(2)]

    @property
    def is_odd(self):
        return self.group.rank == ODD


def another_order(layers):
    losses = [layers.loss(0), layers.loss(1)]
    for n in (1, 0) if layers.is_odd else (0, 1):
        losses[n].backward()


def a_layer_skipped(layers):
    losses = [] if layers.is_odd else [layers.loss(0)]
    sum([*losses, layers.loss(1)]).backward()


def a_backward_left_out(layers):
    loss = layers.loss(0)
    if not layers.is_odd:
        loss.backward()
    layers.loss(1).backward()


def a_backward_twice(layers):
    losses = [layers.loss(0), layers.loss(1)]
    losses[1].backward(retain_graph=True)
    losses[1 if layers.is_odd else 0].backward()


def an_exception_that_is_caught(layers):
    for n in range(2):  # steps
        try:
            loss = layers.loss(n)
            if layers.is_odd and n == 0:
                raise ValueError("a batch that cannot be read")
            loss.backward()
        except ValueError:
            continue


def a_gradient_of_lse_on_one_rank(layers):
    out, lse = seqpar.attention_with_lse(*layers.mine[0], layers.plan)
    (out.sum() + lse.sum() if layers.is_odd else out.sum()).backward()


def out_of_step(group, act, strategy, options):
    """(what the rank was told, gradients before and after)."""
    layers = Layers(group, strategy, **options)
    before = layers.gradients()
    with pytest.raises(DesyncError) as raised:
        act(layers)
    return str(raised.value), before, layers.gradients()


def check(results):
    for text, before, after in results:
        assert text.startswith("ranks disagree"), text
        assert "backward of attention number" in text, text
        assert f"on rank {ODD}" in text, text
        for xs, ys in zip(before, after, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


ACTS = [
    another_order,
    a_layer_skipped,
    a_backward_left_out,
    a_backward_twice,
    an_exception_that_is_caught,
    a_gradient_of_lse_on_one_rank,
]
CALLS = [*((name, {}) for name in STRATEGIES), ("ulysses", {"head_chunks": 2})]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("strategy", "options"), CALLS, ids=str)
def test_every_rank_is_told_and_the_next_step_is_right(act, strategy, options):
    check(simulate(4, out_of_step, act, strategy, options))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_over_processes(worlds, act, strategy):
    check(worlds.run(3, out_of_step, act, strategy, {}))


def groups_of_the_same(group):
    """Two groups over the same wire, made as where each layer makes its own."""
    of = group.transport.process_group
    return seqpar.Group.of(of), seqpar.Group.of(of)


def views_of_the_same(group):
    return group.grid(ring=2).ring, group.grid(ring=2).ring


def another_order_in_groups_of_their_own(group, make):
    layers = [Layers(own, "ring") for own in make(group)]
    losses = [layer.loss(0) for layer in layers]
    with pytest.raises(DesyncError, match="backward of attention number"):
        losses[layers[0].is_odd].backward()
    return True


def test_groups_over_the_same_processes_count_together(worlds):
    assert all(worlds.run(3, another_order_in_groups_of_their_own, groups_of_the_same))


def test_views_of_the_same_ranks_count_together():
    assert all(simulate(4, another_order_in_groups_of_their_own, views_of_the_same))


def split_backward(group, strategy, ends):
    """Goes back to q, k, v in one order, and later to slopes, from attention itself, in that of `ends`."""
    layers = Layers(group, strategy)
    slopes = [torch.ones(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    nodes, inner, wanted = [], {}, []
    for n in range(2):
        layers.plan = replace(layers.plan, score=seqpar.Score(alibi_slopes=slopes[n]))
        wanted.append(torch.autograd.grad(layers.loss(n), slopes[n])[0])
        loss = layers.loss(n)
        node = loss.grad_fn
        while not node.name().startswith(("_Loop", "_Materialised")):
            node = node.next_functions[0][0]
        handle = node.register_prehook(lambda grads, n=n: inner.update({n: grads}))
        torch.autograd.grad(loss, layers.mine[n], retain_graph=True)
        handle.remove()
        nodes.append(node)
    found = {}
    for n in ends[group.rank == ODD]:
        edges = [GradientEdge(nodes[n], i) for i, g in enumerate(inner[n]) if g is not None]
        given = [g for g in inner[n] if g is not None]
        (found[n],) = torch.autograd.grad(edges, slopes[n], given)
    assert all(torch.equal(found[n], wanted[n]) for n in range(2))
    return True


BY_BLOCKS = ["ring", "allgather", "mesh", "hybrid", "materialised_columns"]


@pytest.mark.parametrize("strategy", BY_BLOCKS)
def test_backward_may_begin_at_attention(strategy):
    """As in a pipeline that takes gradients of inputs first, and those of weights later."""
    assert all(simulate(4, split_backward, strategy, [(1, 0), (1, 0)]))


@pytest.mark.parametrize("strategy", BY_BLOCKS)
def test_backward_that_begins_at_attention_is_agreed_on(strategy):
    with pytest.raises(DesyncError, match="backward of the parameters of attention number"):
        simulate(4, split_backward, strategy, [(0, 1), (1, 0)])


@pytest.mark.parametrize("act", [another_order, a_backward_twice])
def test_compiled_calls_too(act):
    def fn(group):
        torch.compiler.reset()
        layers = Layers(group, "ring")
        layers.loss = torch.compile(layers.loss, backend="aot_eager")
        with pytest.raises(DesyncError, match="backward of attention number"):
            act(layers)
        return True

    assert all(simulate(2, fn))


def test_rows_that_were_gathered_go_back_together_too():
    def fn(group):
        layout = seqpar.contiguous(LENGTH, group.size)
        rows = torch.ones(1, layout.rows[group.rank], requires_grad=True)
        wholes = [seqpar.unshard_sequence(rows, layout, group) for _ in range(2)]
        with pytest.raises(DesyncError, match="backward of unshard_sequence number"):
            wholes[group.rank == ODD].sum().backward()
        return True

    assert all(simulate(3, fn))


def calls_agreed(group, agree, compiled=False):
    """Elements of agreement, and gradients, of the first step, of the next, and of one of another shape."""
    layers = Layers(group, "ring", agree=agree)
    if compiled:
        torch.compiler.reset()
        layers.loss = torch.compile(layers.loss, backend="aot_eager")
    steps = []
    for heads in (4, 4, 2):
        layers.mine = [
            [x[:, :, :heads].detach().requires_grad_() for x in xs] for xs in layers.mine
        ]
        group.traffic.reset()
        gradients = layers.gradients()
        steps.append((group.traffic.agreement.elements, gradients))
    return steps


@pytest.mark.parametrize("compiled", [False, True])
def test_a_plan_that_is_agreed_on_once_is_compared_again_only_where_shapes_are_new(compiled):
    """Two layers, forward and backward, send two numbers each; of a trusted plan the first call does."""
    for per_call, once in zip(
        simulate(2, calls_agreed, "call", compiled),
        simulate(2, calls_agreed, "plan", compiled),
        strict=True,
    ):
        assert [n for n, _ in per_call] == [8, 8, 8]
        assert [n for n, _ in once] == [2, 0, 2]
        for (_, xs), (_, ys) in zip(per_call, once, strict=True):
            assert all(
                torch.equal(x, y)
                for a, b in zip(xs, ys, strict=True)
                for x, y in zip(a, b, strict=True)
            )


def test_ranks_that_trust_differently_are_told():
    def fn(group):
        layers = Layers(group, "ring", agree="plan" if group.rank == ODD else "call")
        with pytest.raises(DesyncError, match="agree is 'call' on rank 0, 'plan' on rank 1"):
            layers.loss(0)
        layers = Layers(group, "ring", agree="never")
        with pytest.raises(
            ValueError, match=r"agree must be one of \('call', 'plan'\), got 'never'"
        ):
            layers.loss(0)
        return True

    assert all(simulate(2, fn))
