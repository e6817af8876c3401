"""Second derivatives are right or refused, in the first backward and on every rank; none is dropped.

A failure of the walk localises a backward that does not say how often it may be differentiated.
"""

import importlib
import pkgutil

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import seqpar
import seqpar_kernels
from seqpar import Mask, Plan, simulate, zigzag
from seqpar.comm import all_gather, all_reduce, reduce_scatter, replicate
from seqpar.strategies import STRATEGIES
from seqpar_kernels.derivatives import orders_of

REFUSED = "give first derivatives only, but backward ran with create_graph=True"
LENGTH = 8
# Of what gives derivatives of any order, the test that compares them is below.
ANY_ORDER = {"_AgreedBackward", "_AllGather", "_ReduceScatter", "_AllReduce", "_Replicate"}
ANY_ORDER |= {"_Together", "_GradientTimes"}


def functions():
    """All autograd Functions of the two packages, whichever module they are in."""
    for package in (seqpar, seqpar_kernels):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("__main__"):
                continue
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if "needs torchtitan" not in str(error):  # which is no part of the lock
                    raise
    found, ahead = [], [torch.autograd.Function]
    while ahead:
        made = ahead.pop().__subclasses__()
        ahead += made
        found += [f for f in made if f.__module__.split(".")[0] in ("seqpar", "seqpar_kernels")]
    return found


def test_every_backward_says_how_often_it_may_be_differentiated():
    found = {f.__name__: orders_of(f.backward) for f in functions()}
    assert [name for name, orders in found.items() if orders is None] == []
    assert {name for name, orders in found.items() if orders == "any"} == ANY_ORDER
    assert len(found) > 10


def attended(group, strategy):
    """(x, out) of a call in which one tensor is q, k and v."""
    layout = zigzag(LENGTH, group.size)
    generator = torch.Generator().manual_seed(group.rank)
    x = torch.randn(1, layout.rows[group.rank], 2, 4, dtype=torch.float64, generator=generator)
    grid = group.grid(ulysses=group.size) if STRATEGIES[strategy].needs_grid else None
    plan = Plan(group, layout, Mask(causal=True), strategy=strategy, grid=grid)
    return x.requires_grad_(), seqpar.attention(x, x, x, plan)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_attention_refuses_a_graph_of_its_gradients_on_every_rank(strategy, size):
    """A loss that is linear in out, too: its gradient is a constant, and so were those of attention."""

    def fn(group, loss):
        x, out = attended(group, strategy)
        with pytest.raises(NotImplementedError, match=REFUSED):
            torch.autograd.grad(loss(out), x, create_graph=True)
        return True

    for loss in (torch.Tensor.sum, lambda out: out.square().sum()):
        assert simulate(size, fn, loss) == [True] * size


def test_attention_refuses_over_processes(worlds):
    assert worlds.run(2, refused_on_rank) == [True] * 2


def refused_on_rank(group):
    x, out = attended(group, "ulysses")
    try:
        torch.autograd.grad(out.sum(), x, create_graph=True)
    except NotImplementedError as error:
        return REFUSED in str(error)
    return False


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("strategy", ["ring", "ulysses", "allgather"])
def test_kept_attention_is_refused_too(strategy, size):
    def fn(group):
        layout = zigzag(LENGTH, group.size)
        x = torch.randn(1, layout.rows[group.rank], 2, 4, requires_grad=True)
        plan = Plan(group, layout, strategy=strategy)
        block = lambda y: seqpar.attention(y.sin(), y, y, plan).cos()  # noqa: E731
        kept = {"use_reentrant": False, "context_fn": seqpar.keep_attention}
        for options in ({"use_reentrant": False}, kept):
            out = checkpoint(block, x, **options)
            with pytest.raises(NotImplementedError, match=REFUSED):
                torch.autograd.grad(out.sum(), x, create_graph=True)

    simulate(size, fn)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("strategy", ["ring", "ulysses", "allgather"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_backward_where_grad_mode_is_on_around_it_is_none_of_that(strategy, size, use_reentrant):
    """Inside of a recomputation and of `enable_grad`, but without a graph of the gradients."""

    def fn(group):
        layout = zigzag(LENGTH, group.size)
        plan = Plan(group, layout, strategy=strategy)
        x = torch.randn(1, layout.rows[group.rank], 2, 4, requires_grad=True)
        block = lambda y: seqpar.attention(y, y, y, plan)  # noqa: E731
        with torch.enable_grad():
            checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
        return x.grad.isfinite().all().item()

    assert all(simulate(size, fn))


def test_second_derivatives_of_what_comes_after_attention_are_not_refused():
    def fn(group):
        _, out = attended(group, "ring")
        w = torch.ones(4, dtype=torch.float64, requires_grad=True)
        loss = (out @ w).pow(3).sum()
        (dw,) = torch.autograd.grad(loss, w, create_graph=True)
        return torch.autograd.grad(dw.sum(), w)[0].abs().sum().item()

    assert all(x > 0 for x in simulate(2, fn))


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "allgather"])
@pytest.mark.parametrize("name", ["k", "sinks"])
def test_forward_mode_is_refused(strategy, name):
    """An op without a formula for it drops tangents in silence."""

    def fn(group):
        layout = zigzag(LENGTH, group.size)
        given = {name: torch.randn(1, layout.rows[group.rank], 2, 4) for name in "qkv"}
        given["sinks"] = torch.zeros(2)
        given[name] = forward_ad.make_dual(given[name], given[name])
        score = seqpar.Score(sinks=given.pop("sinks"))
        seqpar.attention(*given.values(), Plan(group, layout, score=score, strategy=strategy))

    for size in (1, 2):
        # One level for all ranks, which are threads: torch counts levels by process.
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=f"no forward-mode .* but {name} carries"),
        ):
            simulate(size, fn)


def test_gradients_that_want_gradients_are_not_summed_in_place():
    def fn(group):
        p = torch.ones(2, requires_grad=True)
        (p.grad,) = torch.autograd.grad(p.pow(3).sum(), p, create_graph=True)
        seqpar.sum_gradients([p], group)

    with pytest.raises(
        NotImplementedError, match=r"no derivative, .* create_graph=True; detach it"
    ):
        simulate(2, fn)


ROWS = (3, 1, 0)  # by rank
TENSORS = {"gather": [(n, 2) for n in ROWS], "scatter": [(4, 2)] * 3, "reduce": [(4, 2)] * 3}


def given(kind):
    """What the ranks hold, and what they weigh their results with."""
    generator = torch.Generator().manual_seed(5)
    normal = lambda shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    weights = [(sum(ROWS), 2)] * 3 if kind == "gather" else TENSORS["gather"]
    xs = [normal(shape).requires_grad_() for shape in TENSORS[kind]]
    return xs, [normal(shape) for shape in weights]


@pytest.mark.parametrize("kind", ["gather", "scatter"])
def test_gathers_and_scatters_have_second_derivatives(kind):
    """Of the penalty sum g^2 on the gradient g of sum w y^3; on all ranks and on one."""

    def fn(group):
        xs, ws = given(kind)
        x, w = xs[group.rank], ws[group.rank]
        y = (all_gather if kind == "gather" else reduce_scatter)(x, group, ROWS, 0)
        (g,) = torch.autograd.grad((w * y.pow(3)).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    xs, ws = given(kind)
    ys = [torch.cat(xs)] * 3 if kind == "gather" else sum(xs).split(ROWS)
    loss = sum((w * y.pow(3)).sum() for w, y in zip(ws, ys, strict=True))
    gs = torch.autograd.grad(loss, xs, create_graph=True)
    want = torch.autograd.grad(sum(g.square().sum() for g in gs), xs)
    for a, b in zip(simulate(3, fn), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_sum_over_ranks_has_a_second_derivative():
    """All ranks compute one loss of the sum, and one penalty on the gradients of all of them."""

    def fn(group):
        x = given("reduce")[0][group.rank]
        y = all_reduce(x.sin(), group)
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(all_reduce((group.rank + 1) * g.square().sum(), group), x)[0]

    xs, _ = given("reduce")
    gs = torch.autograd.grad(sum(x.sin() for x in xs).pow(3).sum(), xs, create_graph=True)
    want = torch.autograd.grad(sum((n + 1) * g.square().sum() for n, g in enumerate(gs)), xs)
    for a, b in zip(simulate(3, fn), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_ranks_hold_alike_has_a_second_derivative():
    """Every rank adds to one loss, and all compute one penalty on its gradient."""

    def fn(group):
        x = given("reduce")[0][0]
        loss = (group.rank + 1) * replicate(x, group).sin().pow(3).sum()
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    x = given("reduce")[0][0]
    (g,) = torch.autograd.grad(6 * x.sin().pow(3).sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(g.square().sum(), x)
    for a in simulate(3, fn):
        torch.testing.assert_close(a, want, rtol=1e-12, atol=1e-12)


def test_what_hands_gradients_on_hands_on_second_ones():
    from seqpar.loss import _GradientTimes
    from seqpar.strategies.ulysses import _Together

    x = torch.linspace(0.5, 2.0, 4, dtype=torch.float64, requires_grad=True)
    for y, factor in ((_Together.apply(x)[0], 1), (_GradientTimes.apply(x, 3), 3)):
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        torch.testing.assert_close(g, factor * 3 * x.square())
        (second,) = torch.autograd.grad(g.sum(), x)
        torch.testing.assert_close(second, factor**2 * 6 * x)
