"""FlexAttention as an implementation: equal to the reference, on what it computes on a CPU without compiling.

There it has no backward for its users, which is switched on here: the adapter is the same as on a GPU.
"""

from threading import Lock

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.kernel.flex.flex_attention import validate_joint_graph
from torch.nn.attention import flex_attention as theirs

import seqpar
from seqpar import Mask, Plan, Score, simulate
from seqpar.strategies import STRATEGIES
from seqpar.testing.drawn import examples
from seqpar_kernels import (
    Band,
    Block,
    Dropout,
    MaskMod,
    Partial,
    Ranges,
    Rows,
    accumulation_dtype,
    attend,
    attend_backward,
    choice,
    finish,
    flex,
    sums_for,
)

# It says so where it is not compiled.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
EXACT = {"rtol": 1e-11, "atol": 1e-11}
MADE = flex._flex, flex._block_mask


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    def asked_anew():
        choice.refusal.cache_clear()
        choice.choose.cache_clear()

    asked_anew()
    monkeypatch.setattr(theirs, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_flex", lambda _: theirs.flex_attention)
    monkeypatch.setattr(flex, "_block_mask", lambda _: theirs.create_block_mask)
    monkeypatch.setitem(choice._REFUSALS, "flex", lambda _: None)
    # Not compiled it traces functions in every call, of one thread at a time.
    lock = Lock()
    for name in ("forward", "backward"):
        monkeypatch.setattr(flex, name, alone(getattr(flex, name), lock))
    with torch._dynamo.config.patch(recompile_limit=10**6, accumulated_recompile_limit=10**6):
        yield
    torch._dynamo.reset()
    asked_anew()


def alone(run, lock):
    def locked(*args, **options):
        with lock:
            return run(*args, **options)

    return locked


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def not_itself(b, h, i, j):
    return i != j + h + b


def learned_mod(s, b, h, i, j):
    return torch.tanh(s) + FACTORS[h] * (i - j) + b


FACTORS = numbers(3, seed=4).requires_grad_()
SCORES = st.fixed_dictionaries(
    {"scale": st.sampled_from([0.4, -0.3])},
    optional={
        "softcap": st.just(3.0),
        "alibi_slopes": st.just(numbers(2, seed=5)),
        "sinks": st.just(numbers(2, seed=6)),
        "score_mod": st.just(learned_mod),
        "bias": st.sampled_from([numbers(3, 2, 120, 120, seed=7), numbers(120, seed=8)]),
        "relative_bias": st.sampled_from([numbers(2, 7, seed=9), numbers(3, 1, 1, seed=10)]),
    },
)


@torch.no_grad()
def results(block, hops, implementation):
    """(out, lse, gradients) with the keys in these blocks, whose backward is that of the whole."""
    hkv, num = 1, hops[-1][1]
    q, k, v, dout = (numbers(2, n, h, w, seed=n + w) for n, h, w in
                     ((9, 2, 8), (num, hkv, 8), (num, hkv, 5), (9, 2, 5)))  # fmt: skip
    running = Partial.identity(q, 5)
    for a, b in reversed(hops):
        part = q, k[:, a:b], v[:, a:b], block.at(0, a)
        attend(*part, into=running, implementation=implementation)
    out, lse = finish(running, q.dtype, block.score, implementation=implementation)
    rows = Rows.of(q, out, dout, lse, torch.ones_like(lse), implementation=implementation)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    tables = [x for n, x in block.score.tensors.items() if "bias" in n]
    sums = sums_for([*tables, *block.score.captured])
    learned = {n: torch.zeros_like(lse) for n in ("alibi_slopes",) if n in block.score.tensors}
    for a, b in reversed(hops):
        into = grads[0], *(x[:, a:b] for x in grads[1:])
        attend_backward(
            rows, k[:, a:b], v[:, a:b], block.at(0, a), into=into, sums=sums, learned=learned,
            implementation=implementation,
        )  # fmt: skip
    by_head = [x.sum((0, 1)) for x in learned.values()]
    return out, lse, *grads, *(total for _, total in sums), *by_head


@settings(max_examples=examples(1.0))
@given(
    lower=st.none() | st.integers(-12, 4), upper=st.none() | st.integers(-4, 12), score=SCORES,
    ranges=st.none() | st.just((0, 6, 30, 120)), row=st.integers(0, 40), col=st.integers(0, 40),
    step=st.integers(1, 3), mod=st.booleans(), cuts=st.lists(st.integers(1, 12), max_size=2),
)  # fmt: skip
@example(None, 0, {"scale": 0.4}, None, 0, 0, 1, True, [4])
def test_equals_the_reference(lower, upper, score, ranges, row, col, step, mod, cuts):
    terms = [Ranges.documents(ranges)] if ranges else []
    terms += [MaskMod(lambda b, h, i, j: (i + j + h + b) % 3 != 0)] if mod else []
    score = {
        n: x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x
        for n, x in score.items()
    }
    block = Block(Band(lower, upper), Score(**score), row, col, step, 1, 1, tuple(terms))
    ends = [0, *sorted({*cuts, 12}), 12]
    hops = [(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True) if a < b]
    for got, want in zip(
        results(block, hops, "flex"), results(block, hops, "reference"), strict=True
    ):
        torch.testing.assert_close(got.detach(), want.detach(), **EXACT)


N = 23


def trained(group, implementation, strategy):
    layout = seqpar.zigzag(N, group.size)
    mine = layout.positions(group.rank)
    q, k, v, dout = (numbers(2, N, h, 16, seed=h)[:, mine] for h in (4, 2, 2, 4))
    table = numbers(4, 9, seed=1).requires_grad_()
    mask = Mask(True, documents=(0, 9, N)) & Mask(mask_mod=lambda b, h, i, j: (i - j) % 3 != b + 1)
    score = Score(relative_bias=table, score_mod=lambda s, b, h, i, j: s * (1 + FACTORS[h % 3]))
    grid = group.grid(ulysses=1) if STRATEGIES[strategy].needs_grid else None
    plan = Plan(group, layout, mask, score, strategy, implementation, grid=grid)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = seqpar.attention_with_lse(*leaves, plan)
    seen = lse.masked_fill(lse == -torch.inf, 0.0)
    grads = torch.autograd.grad((out, seen), [*leaves, table, FACTORS], (dout, dout[..., 0]))
    return out.detach(), lse.detach(), *grads


@pytest.mark.parametrize("strategy", [n for n, s in STRATEGIES.items() if not s.stores_scores])
def test_serves_every_strategy(strategy):
    for size in (1, 3):
        for one, other in zip(
            simulate(size, trained, "flex", strategy), simulate(size, trained, "reference", strategy),
            strict=True,
        ):  # fmt: skip
            for got, want in zip(one, other, strict=True):
                torch.testing.assert_close(got, want, **EXACT)


def test_other_places_compile_nothing_anew(monkeypatch):
    """Bands, positions, heads, documents and numbers are tensors of one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile

    def counting(call, **options):
        return compiled(call, backend=counter if options else "aot_eager", **options)

    first = 0
    for made, name in zip(MADE, ("_flex", "_block_mask"), strict=True):
        made.cache_clear()
        monkeypatch.setattr(flex, name, made)
    monkeypatch.setattr(torch, "compile", counting)
    for n in range(4):
        slopes, relative = (numbers(*s, seed=n).requires_grad_() for s in ((2,), (2, 7)))
        score = Score(0.4 + n, 3.0 + n, slopes, relative_bias=relative, score_mod=learned_mod)
        terms = (Ranges.documents((0, 6 + n, 120)), MaskMod(not_itself))
        block = Block(Band(-9 - n, n), score, 3 + n, n, 1, n % 2, 1, terms)
        for got, want in zip(
            results(block, [(0, 12)], "flex"), results(block, [(0, 12)], "reference"), strict=True
        ):
            torch.testing.assert_close(got.detach(), want.detach(), **EXACT)
        first = counter.frame_count if n == 0 else first
    assert counter.frame_count == first
    for made in MADE:
        made.cache_clear()


@pytest.mark.parametrize(
    "score",
    [
        {"relative_bias": (2, 7)}, {"relative_bias": (7,)}, {"bias": (1, 2, 12, 12)}, {"bias": (12,)},
        {"alibi_slopes": (2,)}, {"score_mod": learned_mod},
    ],
    ids=lambda score: " ".join(score),
)  # fmt: skip
def test_what_learns_is_differentiated_on_a_gpu(score, monkeypatch):
    """There it takes no graph that goes on after it has looked something up; here it would not say so."""
    checked = []

    def check(graph, _):
        for name, module in graph.named_modules():
            if "joint" in name:
                validate_joint_graph(module.graph)
                checked.append(name)
        return make_boxed_func(graph.forward)

    compiled, backend = torch.compile, aot_autograd(fw_compiler=check, bw_compiler=check)
    call = flex._with_own_graphs(theirs.flex_attention)
    attend = compiled(call, backend=backend, fullgraph=True)
    monkeypatch.setattr(flex, "_flex", lambda _: attend)
    score = {n: x if callable(x) else numbers(*x).requires_grad_() for n, x in score.items()}
    results(Block(Band(None, 0), Score(0.4, **score)), [(0, 12)], "flex")
    assert checked


def test_compiled_calls_have_gradients():
    """Inside of an op, where autograd does not look."""
    group, layout = seqpar.Group.alone(), seqpar.contiguous(9, 1)
    table = numbers(2, 7).requires_grad_()
    found = []
    for implementation in ("flex", "reference"):
        plan = Plan(
            group, layout, Mask(True), Score(0.4, relative_bias=table), "ring", implementation
        )
        run = torch.compile(
            lambda x, plan=plan: seqpar.attention(x, x, x, plan), backend="aot_eager"
        )
        x = numbers(1, 9, 2, 16).requires_grad_()
        found.append(torch.autograd.grad(run(x).square().sum(), [x, table]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize(
    ("d", "dtype", "terms", "said"),
    [
        (16, torch.float32, (), "does not run on cpu, where it has no backward"),
        (16, torch.float64, (), "does not run on cpu"),
        (16, torch.float32, (Dropout(0.1, 3),), "does not run on cpu"),
    ],
)
def test_refused(monkeypatch, d, dtype, terms, said):
    monkeypatch.setitem(choice._REFUSALS, "flex", choice._flex)
    x = torch.zeros(1, 4, 2, d, dtype=dtype)
    with pytest.raises(NotImplementedError, match=said):
        choice.choose(choice.Request.of(x, x, terms), "flex")


def test_what_it_lacks_on_a_gpu(monkeypatch):
    monkeypatch.setattr(choice, "_is_ampere", lambda _: True)
    device = torch.device("cuda")

    def lacking(dtype, d, *terms):
        return choice._flex(choice.Request(device, dtype, d, d, terms))

    assert lacking(torch.bfloat16, 64) is None
    assert lacking(torch.float64, 64) == "accumulates in float32 and refuses float64"
    assert lacking(torch.float32, 8) == "has no head dim below 16, got 8"
    assert lacking(torch.float32, 64, Dropout) == "has no dropout"
    monkeypatch.setattr(choice, "_is_ampere", lambda _: False)
    assert lacking(torch.float32, 64) == "needs compute capability 8.0 or newer"
    assert accumulation_dtype(torch.bfloat16) == torch.float32
