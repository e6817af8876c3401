"""The two torch ops: what the compiler is told of them is what they do."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from seqpar_kernels import (
    TENSORS,
    Band,
    Block,
    Dropout,
    Partial,
    Ranges,
    Rows,
    Score,
    aten,
    attend_backward,
    attention,
    attention_with_lse,
    reference,
)
from seqpar_kernels.torch_internals import nobody_looks


def numbers(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


BLOCKS = {
    "plain": Block(Band(None, 0), Score(0.4)),
    "everything": Block(
        Band(-20, 3),
        Score(0.4, 5.0, torch.tensor([0.1, 0.2]).double(), torch.tensor([0.5, -1.0]).double()),
        row=3, col=1, step=2, head=1, terms=(Ranges.documents((0, 9, 30)), Dropout(0.3, 7)),
    ),
    "biases": Block(
        Band(-8, 3), Score(0.4, bias=numbers(2, 20, 24), relative_bias=numbers(5)), row=3, col=1, step=2,
    ),
}  # fmt: skip


def problem(block):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, h, d, dtype=torch.float64, generator=generator).requires_grad_()
        for n, h, d in ((9, 2, 8), (12, 1, 8), (12, 1, 5))
    )
    score = block.score
    learned = [x.requires_grad_() for x in score.tensors.values()]
    return (q, k, v), learned


@pytest.mark.parametrize("lse_learns", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_ops_pass_the_checks_of_torch(name, lse_learns):
    block = BLOCKS[name]
    (q, k, v), _ = problem(block)
    documents, drop = block.terms or (None, None)
    score, place = block.score, [block.row, block.col, block.step, block.head, block.batch]
    described = (
        *(score.tensors.get(name) for name in TENSORS), block.band.lower, block.band.upper, score.factor,
        place,
        score.softcap, *(documents.written() if documents else [None]),
        drop.p if drop else None, drop.seed if drop else None, lse_learns, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.seqpar.attention_forward, (q, k, v, *described))
    out, lse = (x.detach() for x in attention(q, k, v, block))
    plain = [None if x is None else x.detach() for x in described[: len(TENSORS)]]
    tensors = [x.detach() for x in (torch.ones_like(out), q, k, v, out, lse)]
    learn = [x is not None for x in plain]
    dlse = torch.ones_like(lse) if lse_learns else None
    arguments = (tensors[0], dlse, *tensors[1:], learn, *plain, *described[len(TENSORS) :])
    torch.library.opcheck(torch.ops.seqpar.attention_backward, arguments)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_those_of_finite_differences(name):
    (q, k, v), learned = problem(BLOCKS[name])
    if name == "plain":  # another kernel than with lse
        assert torch.autograd.gradcheck(lambda *x: attention(*x, BLOCKS[name])[0], (q, k, v))
    assert torch.autograd.gradcheck(
        lambda *x: attention_with_lse(*x[:3], BLOCKS[name]), (q, k, v, *learned)
    )


def test_the_op_hands_on_everything_it_is_told():
    """Positions, head, documents, dropout and implementation reach the kernel: each one matters."""
    block = BLOCKS["everything"]
    (q, k, v), _ = problem(block)
    with torch.no_grad():
        out, lse = attention(q, k, v, block)
        running = Partial.identity(q, 5)
        reference.forward(q, k, v, block, running)
        for got, expected in zip(
            (out, lse), running.finish(q.dtype, block.score.sinks), strict=True
        ):
            assert torch.equal(got, expected)
        for change in (
            {"row": 4}, {"col": 2}, {"step": 1}, {"head": 0}, {"band": Band(-2, 3)},
            {"terms": block.terms[:1]}, {"terms": block.terms[1:]},
            {"terms": (block.terms[0], Dropout(0.3, 8))},
        ):  # fmt: skip
            assert not torch.equal(attention(q, k, v, replace(block, **change))[0], out), change
        with pytest.raises(NotImplementedError, match="'aten' has no softcap"):
            attention(q, k, v, block, implementation="aten")


class Ops(TorchDispatchMode):
    """Names the ops that are called in it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def step(block, tensors, lse_learns):
    """(out, lse and all gradients, what has kept the graph)."""
    (q, k, v), learned = tensors
    out, lse = (attention_with_lse if lse_learns else attention)(q, k, v, block)
    loss = out.square().sum() + (lse.sum() if lse_learns else 0.0)
    wanted = [x for x in (q, k, v, *learned) if x.requires_grad]
    return [out, lse, *torch.autograd.grad(loss, wanted)], out.grad_fn.name()


@pytest.mark.parametrize("lse_learns", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_nobody_looks_and_the_same_comes_out(name, lse_learns):
    """Where a mode would see the op it is called; elsewhere the same functions run without it."""
    block, ops = BLOCKS[name], Ops()
    tensors = problem(block)
    alone, node = step(block, tensors, lse_learns)
    with ops:
        seen, other = step(block, tensors, lse_learns)
    assert all(torch.equal(a, b) for a, b in zip(alone, seen, strict=True))
    assert "seqpar.attention_forward.default" in ops.seen
    assert "seqpar.attention_backward.default" in ops.seen
    assert node != other
    learned = tensors[1]
    for x in learned[1:]:  # some gradients and not others
        x.requires_grad_(False)
    tensors[0][1].requires_grad_(False)
    alone, _ = step(block, tensors, lse_learns)
    with ops:
        seen, _ = step(block, tensors, lse_learns)
    assert all(torch.equal(a, b) for a, b in zip(alone, seen, strict=True))
    for x in (*learned, tensors[0][1]):
        x.requires_grad_()


def test_who_looks_at_backward_alone_sees_its_op():
    """As a compiler of backward does."""
    (q, k, v), _ = problem(BLOCKS["plain"])
    out, _ = attention(q, k, v, BLOCKS["plain"])
    expected = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    with Ops() as ops:
        found = torch.autograd.grad(out.sum(), (q, k, v))
    assert "seqpar.attention_backward.default" in ops.seen
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_without_gradients_nothing_is_kept():
    (q, k, v), _ = problem(BLOCKS["plain"])
    with torch.no_grad():
        out, lse = attention(q, k, v, BLOCKS["plain"])
    assert not out.requires_grad
    assert torch.equal(out, attention(q, k, v, BLOCKS["plain"])[0])
    assert torch.equal(lse, attention(q, k, v, BLOCKS["plain"])[1])


def test_transforms_and_subclasses_see_the_op():
    (q, k, v), _ = problem(BLOCKS["plain"])
    assert nobody_looks((q, k, v, None))
    assert not nobody_looks((q, torch.empty(1, device="meta")))
    assert not nobody_looks((q, Marked(k.detach())))
    with BaseTorchFunctionMode():
        assert not nobody_looks((q,))
    with Ops():
        assert not nobody_looks((q,))
    graph = make_fx(lambda x: attention(x, k, v, BLOCKS["plain"])[0], pre_dispatch=True)(q)
    assert "seqpar.attention_forward" in str(graph.graph)
    seen = []
    torch.func.grad(lambda x: (seen.append(nobody_looks((k,))), x.sum())[1])(q.detach())
    assert seen == [False]


class Marked(torch.Tensor):
    pass


def test_lse_is_not_differentiable_and_says_so():
    (q, k, v), _ = problem(BLOCKS["plain"])
    out, lse = attention(q, k, v, BLOCKS["plain"])
    assert out.requires_grad
    assert not lse.requires_grad


def test_a_differentiable_lse_wants_an_implementation_that_can():
    """The same values, from a kernel that does not derive delta from out: never a silent mistake."""
    (q, k, v), _ = problem(BLOCKS["plain"])
    out, lse = attention_with_lse(q, k, v, BLOCKS["plain"])
    for x, y in zip((out, lse), attention(q, k, v, BLOCKS["plain"]), strict=True):
        torch.testing.assert_close(x, y)
    both = torch.autograd.grad(out.sum() + lse.sum(), q, retain_graph=True)[0]
    apart = [torch.autograd.grad(x.sum(), q, retain_graph=True)[0] for x in (out, lse)]
    torch.testing.assert_close(both, apart[0] + apart[1])
    with pytest.raises(NotImplementedError, match=r"'aten' derives delta .*'reference' does all"):
        attention_with_lse(q, k, v, BLOCKS["plain"], implementation="aten")
    with torch.no_grad():
        shifted = Rows.of(q, out, out, lse, lse)
        into = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
        with pytest.raises(NotImplementedError, match="cannot differentiate lse"):
            attend_backward(shifted[0:3], k, v, BLOCKS["plain"], into=into, implementation="aten")
        with pytest.raises(AssertionError, match="never come here"):
            aten.backward(shifted, k, v, BLOCKS["plain"], into, {})


def test_a_second_derivative_is_refused():
    (q, k, v), _ = problem(BLOCKS["plain"])
    out, _ = attention(q, k, v, BLOCKS["plain"])
    with pytest.raises(NotImplementedError, match="give first derivatives only"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_compiles_to_two_opaque_ops():
    """One graph, no break, and the same numbers."""
    (q, k, v), _ = problem(BLOCKS["plain"])
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def layer(q, k, v):
        return attention(q * 2, k, v, BLOCKS["plain"])[0] + 1

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v), rtol=0, atol=0)
    assert sum("seqpar.attention_forward" in name for name in seen) == 1
    torch._dynamo.reset()


def test_selective_checkpointing_keeps_the_result(monkeypatch):
    """A policy that names the op saves (out, lse): the forward kernels run once."""
    from seqpar_kernels import custom_ops

    (q, k, v), _ = problem(BLOCKS["plain"])
    runs = []
    real = custom_ops.attend_whole
    monkeypatch.setattr(
        custom_ops, "attend_whole", lambda *a, **b: (runs.append(1), real(*a, **b))[1]
    )
    op = torch.ops.seqpar.attention_forward.default

    def policy(_, func, *args, **kwargs):  # noqa: ARG001
        return CheckpointPolicy.MUST_SAVE if func == op else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q):
        return attention(q.sin(), k, v, BLOCKS["plain"])[0].cos()

    for context, expected in (
        ({}, 2),
        ({"context_fn": lambda: create_selective_checkpoint_contexts(policy)}, 1),
    ):
        runs.clear()
        out = checkpoint(layer, q, use_reentrant=False, **context)
        (dq,) = torch.autograd.grad(out.sum(), q)
        assert len(runs) == expected
        torch.testing.assert_close(dq, torch.autograd.grad(layer(q).sum(), q)[0])


AGAIN = """
import sys
import torch
import seqpar

x = torch.randn(1, 6, 2, 4, requires_grad=True)
plan = lambda s: s.Plan(s.Group.alone(), s.zigzag(6, 1), s.Mask(causal=True))
first = seqpar.attention(x, x, x, plan(seqpar))
for name in [n for n in sys.modules if n.partition(".")[0] in ("seqpar", "seqpar_kernels")]:
    del sys.modules[name]
import seqpar as again

assert again is not seqpar
second = again.attention(x, x, x, plan(again))
assert torch.equal(first, second)
second.sum().backward()
"""


def test_the_package_can_be_imported_anew():
    """As notebooks and the tests of others do: an op is defined once, and the last one counts."""
    done = subprocess.run(
        [sys.executable, "-c", AGAIN], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


BETWEEN_GRAPHS = """
import warnings
import torch
from seqpar_kernels import Band, Block, Score, attention

warnings.simplefilter("error")
block = Block(Band(None, 0), Score(0.4))


class Layer(torch.nn.Module):
    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            torch._dynamo.graph_break()
            return attention(x, x, x, block)[0] + 1


x = torch.randn(1, 6, 2, 4, requires_grad=True)
layer = Layer()
out = torch.compile(layer, backend="eager")(x)
assert torch.equal(out, layer(x))
out.sum().backward()
print(sorted(torch._dynamo.utils.counters["frames"].items()))
"""


def test_dynamo_does_not_look_into_an_op_that_is_called_between_two_graphs():
    """It warned of a cache that it might trace wrongly, which is an error here."""
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN_GRAPHS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
