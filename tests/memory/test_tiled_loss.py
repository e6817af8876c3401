"""A loss in tiles is that of all rows at once, and so are its gradients; logits of all rows are never there.

Precision below float64 is judged by float64: no more than twice the error of all rows at once.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import seqpar

ROWS, WIDTH, CLASSES = 23, 8, 50
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def made(dtype=torch.float64, rows=ROWS):
    """(hidden, weight, bias, labels, dloss), one row in three without a label."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, WIDTH), (CLASSES, WIDTH), (CLASSES,)
    leaves = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    labels[::3] = -100
    return *leaves, labels, torch.rand(rows, generator=generator)


def at_once(hidden, weight, labels, bias=None, softcap=None, label_smoothing=0.0):
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


@pytest.mark.parametrize("tile", [1, 7, 100])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 1.5}, {"label_smoothing": 0.2}, {"softcap": 3.0, "label_smoothing": 1.0}],
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_all_rows_at_once(tile, options, with_bias):
    hidden, weight, bias, labels, dloss = made()
    given = options | ({"bias": bias} if with_bias else {})
    learned = [hidden, weight, *([bias] if with_bias else [])]
    got, want = (
        (losses, torch.autograd.grad(losses, learned, dloss.double()))
        for losses in (
            seqpar.tiled_loss(hidden, weight, labels, tile=tile, **given),
            at_once(hidden, weight, labels, **given),
        )
    )
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_gets_no_gradient_and_the_others_theirs(frozen):
    hidden, weight, bias, labels, dloss = made()
    whole = at_once(hidden, weight, labels, bias)
    want = list(torch.autograd.grad(whole, [hidden, weight, bias], dloss.double()))
    leaves = [hidden, weight, bias]
    leaves.pop(frozen).requires_grad_(False)
    want.pop(frozen)
    losses = seqpar.tiled_loss(hidden, weight, labels, tile=5, bias=bias)
    torch.testing.assert_close(
        list(torch.autograd.grad(losses, leaves, dloss.double())), want, **EXACT
    )


def test_batches_a_tied_embedding_and_two_backwards():
    _, weight, _, labels, _ = made()
    ids, labels = torch.arange(22).view(2, 11), labels[:22].view(2, 11).int()

    def losses(of):
        return of(weight[ids].sin(), weight, labels)

    got = losses(lambda *given: seqpar.tiled_loss(*given, tile=4))
    want = losses(lambda h, w, y: at_once(h.flatten(0, 1), w, y.flatten().long()).view(2, 11))
    torch.testing.assert_close(got, want, **EXACT)
    (dwant,) = torch.autograd.grad(want.sum(), weight)
    for _ in range(2):
        (dgot,) = torch.autograd.grad(got.sum(), weight, retain_graph=True)
        torch.testing.assert_close(dgot, dwant, **EXACT)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_and_no_label(rows):
    hidden, weight, _, labels, _ = made(rows=rows)
    losses = seqpar.tiled_loss(hidden, weight, torch.full_like(labels, -100), tile=2)
    assert losses.tolist() == [0.0] * rows
    losses.sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


class Largest(TorchDispatchMode):
    """The most elements that any result has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return out


def test_logits_of_all_rows_are_never_there():
    hidden, weight, _, labels, _ = made()
    hidden, weight = (x.detach().repeat(1, 1).requires_grad_() for x in (hidden, weight))
    with Largest() as largest:
        seqpar.tiled_loss(hidden, weight, labels, tile=3, softcap=2.0).sum().backward()
    assert largest.elements == weight.numel()
    assert weight.numel() < ROWS * CLASSES


def errors(dtype, run):
    """Those of hidden's and weight's gradients, relative, against float64; and the losses."""
    hidden, weight, _, labels, dloss = made(dtype, rows=1024)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = torch.autograd.grad(at_once(*exact, labels), exact, dloss.double())
    losses = run(hidden, weight, labels)
    got = torch.autograd.grad(losses, [hidden, weight], dloss.to(losses.dtype))
    return losses, [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("autocast", [True, False])
def test_16_bits_are_as_exact_as_all_rows_at_once(autocast):
    def tiled(hidden, weight, labels):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return seqpar.tiled_loss(hidden, weight, labels, tile=16)

    def dense(hidden, weight, labels):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return at_once(hidden, weight, labels)

    dtype = torch.float32 if autocast else torch.bfloat16
    (losses, got), (want, dense_errors) = errors(dtype, tiled), errors(dtype, dense)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got, dense_errors, strict=True):
        assert 1e-4 < mine < 1.5 * theirs


def test_second_derivatives_are_refused():
    hidden, weight, _, labels, _ = made()
    losses = seqpar.tiled_loss(hidden, weight, labels, tile=4)
    with pytest.raises(NotImplementedError, match="what is computed in tiles give first"):
        torch.autograd.grad(losses.sum(), weight, create_graph=True)


def changed(**others):
    hidden, weight, bias, labels, _ = made()
    given = {"hidden": hidden, "weight": weight, "labels": labels, "tile": 4, "bias": bias}
    return seqpar.tiled_loss(**(given | others))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"tile": 0}, "tile must be at least 1, got 0"),
        (
            {"labels": torch.full((ROWS,), CLASSES)},
            r"labels must be 0 ... 49 or -100, got 50 ... 50",
        ),
        ({"labels": torch.full((ROWS,), -1)}, "got -1 ... -1"),
        ({"labels": torch.zeros(ROWS)}, "labels must be numbers of classes"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels must be \[b sl\]"),
        ({"weight": torch.zeros(9, 3)}, r"hidden must be \[rows e\]"),
        ({"weight": torch.zeros(CLASSES, WIDTH)}, "must have one dtype"),
        ({"bias": torch.zeros(3)}, r"bias must be \[50\]"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"label_smoothing": 1.5}, "label_smoothing must be between 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(others, message):
    with pytest.raises(ValueError, match=message):
        changed(**others)


def test_compilers_leave_it_out():
    hidden, weight, _, labels, dloss = made()

    def run(of):
        losses = of(hidden.sin(), weight, labels)
        return losses, torch.autograd.grad(losses, [hidden, weight], dloss.double())

    tiled = torch.compile(lambda *given: seqpar.tiled_loss(*given, tile=4), backend="eager")
    torch.testing.assert_close(run(tiled), run(at_once), **EXACT)
    module = torch.nn.Linear(WIDTH, 3).double()
    call = torch.compile(lambda x: seqpar.tiled(module, x.sin(), tile=4, dim=0), backend="eager")
    got, want = (
        torch.autograd.grad(f(hidden).sin().sum(), [hidden, *module.parameters()])
        for f in (call, lambda x: module(x.sin()))
    )
    torch.testing.assert_close(got, want, **EXACT)
