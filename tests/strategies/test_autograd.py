"""What autograd users do around attention: gradcheck, several calls, shared inputs, frozen inputs."""

from functools import partial

import pytest
import torch

import seqpar
from seqpar import Mask, Plan, RingAttention, UlyssesAttention, simulate
from seqpar.layout import zigzag
from seqpar_kernels import aten, reference, triton_attention

MODULES = [RingAttention, UlyssesAttention]
CAUSAL = Mask(causal=True)


def device_of(implementation):
    """Where an implementation is tested: Triton compiles where there is a GPU, else it interprets."""
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


def whole_tensors(length=6, heads=2):
    return torch.randn(
        4, 1, length, heads, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("module", MODULES)
def test_gradcheck(module):
    q, k, v, _ = (x.requires_grad_() for x in whole_tensors())

    def whole_attention(q, k, v):
        def fn(group):
            layout = zigzag(6, group.size)
            mine = (seqpar.shard_sequence(x, layout, group.rank) for x in (q, k, v))
            return module(group, mask=CAUSAL)(*mine, layout)

        outs = simulate(1, fn)
        return outs[0]

    assert torch.autograd.gradcheck(whole_attention, (q, k, v))


@pytest.mark.parametrize("module", MODULES)
def test_finite_differences_across_ranks(module):
    """The derivative of a scalar of all ranks' outputs, along a direction that crosses shards."""
    q, k, v, w = whole_tensors()
    direction = whole_tensors()[3].roll(1, 1)

    def fn(group, step):
        layout = zigzag(6, group.size)
        local = [
            seqpar.shard_sequence(x + step * direction, layout, group.rank).requires_grad_()
            for x in (q, k, v)
        ]
        out = module(group, mask=CAUSAL)(*local, layout)
        value = (out * seqpar.shard_sequence(w, layout, group.rank)).sum()
        grads = torch.autograd.grad(value, local)
        along = seqpar.shard_sequence(direction, layout, group.rank)
        return float(value.detach()), float(sum((g * along).sum() for g in grads))

    def value(step):
        return sum(r[0] for r in simulate(3, fn, step))

    slope = sum(r[1] for r in simulate(3, fn, 0.0))
    assert slope == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-7)


@pytest.mark.parametrize("module", MODULES)
def test_inputs_and_incoming_gradients_are_not_written_to(module):
    q, k, v, w = whole_tensors(12)

    def fn(group):
        layout = zigzag(12, group.size)
        local = [seqpar.shard_sequence(x, layout, group.rank).requires_grad_() for x in (q, k, v)]
        dout = seqpar.shard_sequence(w, layout, group.rank)
        before = [x.detach().clone() for x in (*local, dout)]
        out = module(group, mask=CAUSAL)(*local, layout)
        first = torch.autograd.grad(out, local, dout, retain_graph=True)
        again = torch.autograd.grad(out, local, dout)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, (*local, dout), strict=True))

    simulate(3, fn)


@pytest.mark.parametrize("module", MODULES)
def test_one_tensor_as_q_k_and_v_and_some_inputs_frozen(module):
    q, k, v, w = whole_tensors(8)

    def grads(group, leaves, use):
        layout = zigzag(8, group.size)
        local = [seqpar.shard_sequence(x, layout, group.rank) for x in (q, k, v)]
        for i in leaves:
            local[i].requires_grad_()
        args = [local[i] for i in use]
        out = module(group, mask=CAUSAL)(*args, layout)
        dout = seqpar.shard_sequence(w, layout, group.rank)
        found = torch.autograd.grad(out, [local[i] for i in leaves], dout)
        return [seqpar.unshard_sequence(x, layout, group) for x in found]

    for leaves, use in (([0], (0, 0, 0)), ([1], (0, 1, 2)), ([0, 2], (0, 1, 2))):
        one, three = (simulate(size, grads, leaves, use)[0] for size in (1, 3))
        for a, b in zip(one, three, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_two_plans_on_two_groups_do_not_meet():
    """Ranks 0, 1 and ranks 2, 3 attend different sequences at the same time, then all four one."""
    q, k, v, _ = whole_tensors(8)

    def fn(group):
        results = []
        for module in (RingAttention(group, mask=CAUSAL), UlyssesAttention(group)):
            for length in (8, 5):
                layout = zigzag(length, group.size)
                local = (
                    seqpar.shard_sequence(x[:, :length], layout, group.rank) for x in (q, k, v)
                )
                results.append(seqpar.unshard_sequence(module(*local, layout), layout, group))
        return results

    one, four = simulate(1, fn)[0], simulate(4, fn)[0]
    for a, b in zip(one, four, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_modules_print_their_options():
    text = repr(RingAttention(seqpar.Group.alone(), mask=Mask(causal=True, window=4)))
    assert text == (
        "RingAttention(Group(rank=0, size=1), mask=Mask(causal=True, window=4), "
        "score=Score(scale=None, softcap=None, alibi_slopes=None, sinks=None, score_mod=None, "
        "bias=None, relative_bias=None), "
        "dropout=None)"
    )


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_recomputes_in_step(module, use_reentrant):
    """More ranks than heads: a rank without heads must recompute when the others do."""
    x = torch.randn(1, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def fn(group):
        layout, attend = zigzag(9, group.size), module(group, mask=CAUSAL)
        mine = seqpar.shard_sequence(x, layout, group.rank).requires_grad_()

        def block(y):
            heads = y.unflatten(-1, (2, 4))
            return attend(heads, heads, heads, layout)

        out = torch.utils.checkpoint.checkpoint(block, mine, use_reentrant=use_reentrant).sin()
        (dx,) = torch.autograd.grad(out.sum(), mine) if not use_reentrant else _reentrant(out, mine)
        return seqpar.unshard_sequence(dx, layout, group)

    one, three = simulate(1, fn)[0], simulate(3, fn)[0]
    torch.testing.assert_close(one, three, rtol=0, atol=1e-12)


def _reentrant(out, leaf):
    out.sum().backward()
    return (leaf.grad,)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_gives_the_same_output(module, mode):
    q, k, v, _ = whole_tensors(8)

    def fn(group):
        layout = zigzag(8, group.size)
        with mode():
            mine = (seqpar.shard_sequence(x, layout, group.rank).clone() for x in (q, k, v))
            return module(group, mask=CAUSAL)(*mine, layout)

    def trained(group):
        layout = zigzag(8, group.size)
        mine = (seqpar.shard_sequence(x, layout, group.rank).requires_grad_() for x in (q, k, v))
        return module(group, mask=CAUSAL)(*mine, layout).detach()

    for a, b in zip(simulate(3, fn), simulate(3, trained), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", ["reference", "aten"])
def test_a_backward_inside_autocast_keeps_its_precision(implementation):
    def fn(group, casting):
        q, k, v, w = (x.float().requires_grad_() for x in whole_tensors(8))
        plan = Plan(group, zigzag(8, 1), CAUSAL, implementation=implementation)
        out = seqpar.attention(q, k, v, plan)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=casting):
            return torch.autograd.grad(out, (q, k, v), w)

    for a, b in zip(simulate(1, fn, True)[0], simulate(1, fn, False)[0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_types_of_torchs_own_attention(dtype, cast_to):
    """Out, and gradients in the type of the inputs; the same numbers as from inputs cast by hand."""

    def fn(group):
        layout = zigzag(8, group.size)
        xs = [
            seqpar.shard_sequence(x, layout, group.rank).to(dtype).requires_grad_()
            for x in whole_tensors(8)[:3]
        ]
        with torch.autocast("cpu", dtype=cast_to):
            out = RingAttention(group, mask=CAUSAL)(*xs, layout)
            other, lse = seqpar.attention_with_lse(*xs, Plan(group, layout, CAUSAL))
            heads = (x.detach().transpose(1, 2) for x in xs)
            torchs = torch.nn.functional.scaled_dot_product_attention(*heads)
        assert out.dtype == other.dtype == torchs.dtype
        assert lse.dtype == torch.promote_types(out.dtype, torch.float32)
        by_hand = RingAttention(group, mask=CAUSAL)(*(x.to(out.dtype) for x in xs), layout)
        assert torch.equal(out, by_hand)
        for x, dx in zip(xs, torch.autograd.grad(out.sum(), xs), strict=True):
            assert dx.dtype == x.dtype

    simulate(2, fn)


def test_modules_can_be_copied():
    import copy

    module = RingAttention(seqpar.Group.alone())
    assert copy.deepcopy(module).group is module.group


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("implementation", ["reference", "aten", "triton"])
@pytest.mark.parametrize("size", [1, 2])
def test_any_strides_over_ranks(module, implementation, size):
    """q, k and v of a convolution: neither heads nor width lie together."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 2 * 16, 12, generator=generator)  # [three, b, h d, s]
    x = x.to(device_of(implementation))

    def fn(group, together):
        layout = zigzag(12, group.size)
        local = []
        for t in x.unflatten(2, (2, 16)).permute(0, 1, 4, 2, 3):
            mine = seqpar.shard_sequence(t, layout, group.rank)
            mine = mine.contiguous() if together else mine.mT.contiguous().mT
            local.append(mine.requires_grad_())
        out = module(group, mask=CAUSAL, implementation=implementation)(*local, layout)
        return out.detach(), *torch.autograd.grad(out.square().sum(), local)

    for scattered, together in zip(
        simulate(size, fn, False), simulate(size, fn, True), strict=True
    ):
        for a, b in zip(scattered, together, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def spied(ran, name, real, *args, **options):
    ran.append(name)
    return real(*args, **options)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("implementation", ["reference", "aten", "triton"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_implementation_that_was_asked_for_runs(module, implementation, size, monkeypatch):
    modules = {"reference": reference, "aten": aten, "triton": triton_attention}
    ran = []
    for name, its in modules.items():
        for direction in ("forward", "backward"):
            for way in (direction, f"{direction}_whole"):
                if hasattr(its, way):
                    spy = partial(spied, ran, (name, direction), getattr(its, way))
                    monkeypatch.setattr(its, way, spy)

    def fn(group):
        device = device_of(implementation)
        x = torch.randn(1, 4 // size, 2, 16, requires_grad=True, device=device)
        module(group, implementation=implementation)(x, x, x, zigzag(4, size)).sum().backward()

    simulate(size, fn)
    assert set(ran) == {(implementation, "forward"), (implementation, "backward")}


@pytest.mark.parametrize("module", MODULES)
def test_dropout_is_for_training(module):
    q, k, v, _ = whole_tensors()

    def fn(group, dropout, training):
        layout = zigzag(6, group.size)
        local = (seqpar.shard_sequence(x, layout, group.rank) for x in (q, k, v))
        return module(group, dropout=dropout).train(training)(*local, layout)

    drop = seqpar.Dropout(0.5, 3)
    for rank, plain in enumerate(simulate(2, fn, None, True)):
        assert torch.equal(simulate(2, fn, drop, False)[rank], plain)
        assert not torch.equal(simulate(2, fn, drop, True)[rank], plain)
        never = seqpar.Dropout(0.0, 3)
        assert torch.equal(simulate(2, fn, never, True)[rank], plain)
