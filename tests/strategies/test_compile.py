"""torch.compile: one graph without a break for every strategy, and what it gives is what eager gives."""

from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar import Mask, masks, simulate
from seqpar.calls.options import written
from seqpar.compiled_shapes import is_in_order, lengths_of
from seqpar.testing.case import unsorted
from seqpar_kernels import TENSORS

CAUSAL = Mask(causal=True, window=9)
SCORE = seqpar.Score(softcap=4.0)
MODULES = {
    "ring": lambda g: seqpar.RingAttention(g, mask=CAUSAL),
    "ulysses": lambda g: seqpar.UlyssesAttention(g, mask=CAUSAL),
    "ulysses in chunks": lambda g: seqpar.UlyssesAttention(g, mask=CAUSAL, head_chunks=2),
    "allgather": lambda g: seqpar.AllGatherAttention(g, mask=CAUSAL),
    "mesh": lambda g: seqpar.MeshAttention(g.grid(ulysses=2), mask=CAUSAL),
    "hybrid": lambda g: seqpar.HybridAttention(g.grid(ulysses=2), mask=CAUSAL),
    "rows": lambda g: seqpar.MaterialisedAttention(g, mask=CAUSAL, score=SCORE),
    "columns": lambda g: seqpar.MaterialisedAttention(g, mask=CAUSAL, shard="columns"),
    "depth": lambda g: seqpar.MaterialisedAttention(g, mask=CAUSAL, shard="depth"),
}
COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    COUNTERS.clear()
    yield
    torch._dynamo.reset()


def apart(run, rank):
    """A function whose graphs are of this rank alone: those of one code object are shared by threads."""
    run.__code__ = run.__code__.replace(co_name=f"of_rank_{rank}")
    return run


def num_graphs():
    return COUNTERS["stats"]["unique_graphs"]


def trained(group, make, compiled, *, kept=False, backend="aot_eager"):
    """(out, dx, bytes sent by forward, in all, by agreement) of two blocks after one another."""
    x = torch.randn(1, 21, 16, generator=torch.Generator().manual_seed(0)).double()
    layout, attend = seqpar.contiguous(21, group.size), make(group)
    mine = seqpar.shard_sequence(x, layout, group.rank).requires_grad_()

    def inside(y):
        q, kv = y.sin().unflatten(-1, (4, 4)), y[..., :8].cos().unflatten(-1, (2, 4))
        return y + attend(q, kv, kv.tanh(), layout).flatten(2)

    def block(y):
        if not kept:
            return inside(y)
        return checkpoint(inside, y, use_reentrant=False, context_fn=seqpar.keep_attention)

    run = torch.compile(block, backend=backend, fullgraph=True) if compiled else block
    group.traffic.reset()
    out = run(run(mine))
    forward = group.traffic.total.bytes
    (dx,) = torch.autograd.grad(out.square().sum(), mine)
    return out.detach(), dx, forward, group.traffic.total.bytes, group.traffic.agreement.bytes


def assert_same(compiled, eager):
    for (out, dx, *sent), (out_eager, dx_eager, *sent_eager) in zip(compiled, eager, strict=True):
        assert torch.equal(out, out_eager)
        assert torch.equal(dx, dx_eager)
        assert sent == sent_eager


@pytest.mark.parametrize("name", MODULES)
def test_every_strategy_is_one_graph_with_the_same_bits(name):
    assert_same(
        simulate(2, trained, MODULES[name], True), simulate(2, trained, MODULES[name], False)
    )
    assert not COUNTERS["graph_break"]
    assert num_graphs() == 2, "one for each rank: both calls of it are served"


@pytest.mark.parametrize("name", ["ring", "ulysses"])
def test_one_rank_alone_compiles_too(name):
    assert_same(
        simulate(1, trained, MODULES[name], True), simulate(1, trained, MODULES[name], False)
    )


@pytest.mark.parametrize("name", ["ring", "hybrid"])
def test_processes_compile_too(worlds, name):
    runs = [worlds.run(2, on_process, name, *how, timeout=240) for how in ((True,), (False,))]
    assert_same(*runs)


def on_process(group, name, compiled):
    return trained(group, MODULES[name], compiled)


@pytest.mark.filterwarnings("ignore")  # torch's own, about in-place operations
@pytest.mark.parametrize("name", ["ring", "ulysses"])
def test_checkpointing_that_keeps_attention_compiles(name):
    """Forward's messages are sent once in compiled code as well."""

    def kept(group, compiled):
        return trained(group, MODULES[name], compiled, kept=True)

    plain = simulate(2, trained, MODULES[name], False)
    assert_same(simulate(2, kept, True), plain)
    assert not COUNTERS["graph_break"]


@pytest.mark.parametrize("name", ["ring", "ulysses"])
def test_checkpointing_around_compiled_code_keeps_attention(name):
    def around(group, kept):
        x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0)).double()
        layout, attend = seqpar.zigzag(12, group.size), MODULES[name](group)
        mine = seqpar.shard_sequence(x, layout, group.rank).requires_grad_()

        @torch.compile(backend="aot_eager", fullgraph=True)
        def block(y):
            heads = y.sin().unflatten(-1, (4, 4))
            return attend(heads, heads, heads.cos(), layout).flatten(2).sin()

        context = {"context_fn": seqpar.keep_attention} if kept else {}
        group.traffic.reset()
        out = checkpoint(block, mine, use_reentrant=False, **context)
        forward = group.traffic.total.bytes
        (dx,) = torch.autograd.grad(out.square().sum(), mine)
        return dx, forward, group.traffic.total.bytes

    for (dx, forward, once), (dx_again, _, twice) in zip(
        simulate(2, around, True), simulate(2, around, False), strict=True
    ):
        assert torch.equal(dx, dx_again)
        assert twice == once + forward


def test_learned_scores_lse_and_dropout_compile_and_a_new_seed_compiles_nothing_new():
    def fn(group, compiled):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 11, 16, generator=generator).double()
        slopes = torch.rand(4, generator=generator).double().requires_grad_()
        layout, mask = seqpar.striped(11, group.size), Mask(True, documents=(0, 4, 4, 11))
        mine = seqpar.shard_sequence(x, layout, group.rank).requires_grad_()

        def called(y, slopes, drop):
            score = seqpar.Score(0.3, 4.0, slopes, slopes.sin())
            plan = seqpar.Plan(group, layout, mask, score, "ulysses", dropout=drop)
            heads = y.cos().unflatten(-1, (4, 4))
            out, lse = seqpar.attention_with_lse(heads, heads.sin(), heads, plan)
            return (out * lse.sigmoid().unsqueeze(-1)).flatten(2)

        run = torch.compile(called, backend="aot_eager", fullgraph=True) if compiled else called
        outs = [run(mine, slopes, seqpar.Dropout(0.2, seed)) for seed in range(3, 8)]
        total = sum(out.square().sum() for out in outs)
        return *(out.detach() for out in outs), *torch.autograd.grad(total, (mine, slopes))

    for here, there in zip(simulate(2, fn, True), simulate(2, fn, False), strict=True):
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert not torch.equal(here[0], here[1]), "the seed counts"
    assert num_graphs() <= 4, "one for the first seed, one for all others, of each rank"


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "materialised_rows"])
def test_biases_that_learn_compile(strategy):
    def fn(group, compiled):
        generator = torch.Generator().manual_seed(1)
        layout = seqpar.zigzag(11, group.size)
        x = torch.randn(2, 11, 4, 4, generator=generator).double()
        mine = seqpar.shard_sequence(x, layout, group.rank).requires_grad_()
        bias = torch.randn(4, 11, 1, generator=generator).double().requires_grad_()
        table = torch.randn(8, 4, generator=generator).double().requires_grad_()

        def called(y, bias, table):
            relative = seqpar.biases.t5(table, max_distance=6)
            score = seqpar.Score(bias=bias.sin(), relative_bias=relative)
            plan = seqpar.Plan(group, layout, Mask(True), score, strategy)
            return seqpar.attention(y, y.sin(), y, plan)

        run = torch.compile(called, backend="aot_eager", fullgraph=True) if compiled else called
        out = run(mine, bias, table)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (mine, bias, table))

    for size in (1, 2):
        for here, there in zip(simulate(size, fn, True), simulate(size, fn, False), strict=True):
            for a, b in zip(here, there, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_new_layout_of_the_same_length_is_told_apart():
    """Rows are as many, positions are others: what was compiled for one must not serve the other."""

    def fn(group):
        attend = MODULES["ring"](group)
        x = torch.randn(1, 8, 2, 4, generator=torch.Generator().manual_seed(0))
        run = torch.compile(
            lambda x, layout: attend(x, x, x, layout), backend="aot_eager", fullgraph=True
        )
        for make in (seqpar.zigzag, seqpar.contiguous, seqpar.striped, seqpar.zigzag):
            layout = make(8, group.size)
            mine = seqpar.shard_sequence(x, layout, group.rank)
            assert torch.equal(run(mine, layout), attend(mine, mine, mine, layout))

    simulate(2, fn)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_keys_of_another_length_compile(strategy):
    def fn(group, compiled):
        generator = torch.Generator().manual_seed(0)
        layouts = seqpar.zigzag(11, group.size), seqpar.contiguous(7, group.size)
        x, y = (
            seqpar.shard_sequence(torch.randn(1, n, 4, 4, generator=generator), layout, group.rank)
            for n, layout in zip((11, 7), layouts, strict=True)
        )
        y.requires_grad_()
        mask = seqpar.Mask(window=(2, 3), align="bottom-right")
        plan = seqpar.Plan(group, layouts[0], mask, strategy=strategy, kv_layout=layouts[1])

        def called(x, y):
            return seqpar.attention(x, y.sin(), y.cos(), plan)

        run = torch.compile(called, backend="aot_eager", fullgraph=True) if compiled else called
        out = run(x, y)
        return out.detach(), *torch.autograd.grad(out.sum(), y)

    for here, there in zip(simulate(3, fn, True), simulate(3, fn, False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


CAUSAL = Mask(causal=True)
OTHERS = {
    "windows": [Mask(True, window) for window in (2, 3, 4)],
    "documents": [
        Mask(documents=(0, *cuts, 11)) for cuts in ((4,), (5,), (2, 5), (), (1, 2, 3, 4))
    ],
    "of two sequences": [Mask(documents=((0, n, 11), (0, 5 + n, 11))) for n in range(3)],
    "prefixes": [masks.prefix_lm(n) for n in range(4)],
    "images": [CAUSAL | masks.spans([(n, n + 4), (8, 8 + n)]) for n in range(1, 4)],
    "by batch entry": [[CAUSAL & masks.keys(0, n), masks.prefix_lm(n)] for n in range(3, 6)],
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_masks_are_inputs_of_one_graph(what):
    """Those of every batch may be others: a compiler that took them for constants would give up."""

    def fn(group):
        layout = seqpar.zigzag(11, group.size)
        x = torch.randn(2, 11, 2, 4, generator=torch.Generator().manual_seed(0))
        mine = seqpar.shard_sequence(x, layout, group.rank)

        def called(x, mask, scale):
            score = seqpar.Score(scale=scale)
            return seqpar.attention(x, x, x, seqpar.Plan(group, layout, mask, score))

        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(apart(called, group.rank), backend=counter, fullgraph=True)
        for mask in OTHERS[what]:
            one, other = (mine.clone().requires_grad_() for _ in range(2))
            got, want = run(one, mask, 1.5), called(other, mask, 1.5)
            assert torch.equal(got, want)
            got.sum().backward()
            want.sum().backward()
            assert torch.equal(one.grad, other.grad)
        return counter.frame_count

    assert simulate(2, fn) == [1, 1]


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("name", MODULES)
def test_other_lengths_are_inputs_of_one_graph(name, dynamic):
    """With `dynamic=True` of one; by default of one more, once the compiler has seen a second length."""

    def fn(group):
        attend = MODULES[name](group)
        attend.score = seqpar.Score()  # of numbers the compiler makes constants, and begins anew

        def called(x, layout):
            x = x.transpose(1, 2)
            return attend(x, x[:, :, ::2], x[:, :, 1::2], layout)

        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(
            apart(called, group.rank), backend=counter, fullgraph=True, dynamic=dynamic
        )
        for length in (22, 11, 24, 16, 33):
            layout = seqpar.zigzag(length, group.size)
            one, other = (
                torch.linspace(-1, 1, 32 * layout.rows[group.rank])
                .view(1, 4, -1, 8)
                .requires_grad_()
                for _ in range(2)
            )
            got, want = run(one, layout), called(other, layout)
            assert torch.equal(got, want)
            got.sum().backward()
            want.sum().backward()
            assert torch.equal(one.grad, other.grad)
        return counter.frame_count

    assert simulate(2, fn) == [1 if dynamic else 2] * 2


def test_numbers_that_change_compile_anew():
    """They may become symbols of the compiler, which no message can be planned with."""

    def fn(group):
        layout = seqpar.zigzag(11, group.size)
        mine = torch.ones(1, layout.rows[group.rank], 2, 4)

        def called(x, scale):
            score = seqpar.Score(scale=scale)
            return seqpar.attention(x, x, x, seqpar.Plan(group, layout, CAUSAL, score))

        run = torch.compile(called, backend="aot_eager", fullgraph=True)
        for scale in (1.5, 2.5, 3.5):
            assert torch.equal(run(mine, scale), called(mine, scale))

    simulate(2, fn)


@pytest.mark.parametrize("name", ["ring", "ulysses"])
def test_a_wrong_call_is_an_error_on_every_rank(name):
    """Not of the compiler, which looks on before the others are told."""

    def fn(group):
        attend, layout = MODULES[name](group), seqpar.contiguous(8, group.size)
        run = torch.compile(lambda x: attend(x, x, x, layout), backend="aot_eager", fullgraph=True)
        rows = 3 if group.rank == 1 else 4
        with pytest.raises((ValueError, seqpar.DesyncError), match="rank 1 of 2 must hold 4"):
            run(torch.randn(1, rows, 2, 4))

    simulate(2, fn)


def test_a_single_row_on_a_rank_compiles():
    """The gradients of its k and v arrive side by side, and an op may not give back one memory twice."""

    def fn(group, compiled):
        attend, layout = seqpar.RingAttention(group), seqpar.striped(3, group.size)
        x = torch.randn(1, 3, 1, 4, generator=torch.Generator().manual_seed(0)).double()
        mine = seqpar.shard_sequence(x, layout, group.rank).requires_grad_()

        def called(x):
            return attend(x.sin(), x.cos(), x.tanh(), layout)

        run = torch.compile(called, backend="aot_eager", fullgraph=True) if compiled else called
        return torch.autograd.grad(run(mine).square().sum(), mine)[0]

    for here, there in zip(simulate(3, fn, True), simulate(3, fn, False), strict=True):
        assert torch.equal(here, there)


NONE = [False] * len(TENSORS)


def told(plan):
    """A plan as the op takes it."""
    return *written(plan), *lengths_of(plan), is_in_order(plan)


def test_the_op_passes_the_checks_of_torch():
    def fn(group):
        x = torch.randn(1, 4, 2, 4, dtype=torch.float64, requires_grad=True)
        for strategy in ("ring", "ulysses"):
            plan = seqpar.Plan(group, seqpar.zigzag(4, 1), CAUSAL, strategy=strategy)
            learning = [True, True, True, *NONE]
            inputs = x, x.cos(), x.sin(), *(None for _ in TENSORS)
            arguments = *inputs, plan.group.name, *told(plan), learning, False
            torch.library.opcheck(
                torch.ops.seqpar.sharded_attention, arguments, test_utils=("test_schema", "test_faketensor")
            )  # fmt: skip

    simulate(1, fn)


@pytest.mark.parametrize("length", [3, 11])
@pytest.mark.parametrize("name", MODULES)
def test_the_op_gives_back_neither_an_argument_nor_a_tensor_twice(name, length):
    """What compilers take for granted of an op; torch does not look when it is called."""

    def fn(group):
        layout = seqpar.striped(length, group.size)
        x = torch.randn(1, layout.rows[group.rank], 4, 4, dtype=torch.float64)
        arguments = x, x.cos(), x.sin(), *(None for _ in TENSORS)
        plan = group.name, *told(MODULES[name](group).plan(layout))
        learning = [True, True, True, *NONE]
        kept = torch.ops.seqpar.sharded_attention(*arguments, *plan, learning, False)
        places = [y.untyped_storage() for y in (*arguments[:3], *kept) if y.numel()]
        return len(places) == len({id(place) for place in places})

    assert all(simulate(2, fn))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", MODULES)
def test_what_compilers_expect_is_what_comes(name, size):
    """Shapes, strides and types of all that the op gives, which they make room for before it runs."""
    lengths = (13, 9), (3, 3), (1, 6)

    def fn(group):
        if group.size == 1 and name in ("mesh", "hybrid"):
            return
        kinds = [seqpar.zigzag, seqpar.contiguous] + [unsorted] * (name == "ulysses")
        for make, (n, m), causal in product(kinds, lengths, (False, True)):
            layout, keys = make(n, group.size), make(m, group.size)
            q = torch.randn(3, layout.rows[group.rank], 6, 4)
            k, v = (torch.randn(3, keys.rows[group.rank], 2, w) for w in (4, 5))
            attend = MODULES[name](group)
            attend.mask = Mask(causal, align="bottom-right" if causal else None)
            plan = attend.plan(layout, keys)
            inputs = q, k, v, *(None for _ in TENSORS)
            for learning, with_lse in product((False, True), (False, True)):
                arguments = group.name, *told(plan), [learning] * 3 + NONE, with_lse
                real = torch.ops.seqpar.sharded_attention(*inputs, *arguments)
                with FakeTensorMode() as mode:
                    fakes = [
                        mode.from_tensor(x) if torch.is_tensor(x) else x
                        for x in (*inputs, *arguments)
                    ]
                    fake = torch.ops.seqpar.sharded_attention(*fakes)
                assert [laid_out(x) for x in real] == [laid_out(x) for x in fake], (make, n, m)

    simulate(size, fn)


def laid_out(x):
    """Where there is one place, or none, strides do not matter."""
    strides = [stride for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    return x.shape, strides * (x.numel() > 0), x.dtype


def test_calls_that_do_not_depend_on_each_other_keep_their_order():
    """Ranks whose compilers order messages differently would take one call's rows for the other's."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    group = seqpar.Group.alone()
    attends, layout = (
        [seqpar.RingAttention(group), seqpar.UlyssesAttention(group)],
        seqpar.zigzag(5, 1),
    )

    @torch.compile(backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    def both(x, y):
        return attends[0](x, x, x, layout).sum() * attends[1](y, y, y, layout).sum()

    x, y = (torch.randn(1, 5, 2, 4, requires_grad=True) for _ in range(2))
    both(x, y).backward()
    assert len(graphs) == 2
    for graph in graphs:
        calls = [n for n in graph.graph.nodes if "with_effects" in str(n.target)]
        assert len(calls) == 2
        first, second = calls
        token = second.args[0]
        assert token.args == (first, 0), "the second is given what the first leaves"
