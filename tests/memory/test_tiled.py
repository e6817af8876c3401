"""A module in tiles of rows gives what it gives of all rows at once, and every gradient once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar.testing.models.tiny import FAMILIES, VOCABULARY

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def mlp(dtype=torch.float64, dropout=0.0):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8)
        return nn.Sequential(*layers).to(dtype)


def rows(dtype=torch.float64, length=11):
    x = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def gradients(module, x, run):
    """(out, dx, gradients of parameters), by backward."""
    module.zero_grad()
    x.grad = None
    out = run(x)
    (out.sin() * torch.arange(out.numel()).view(out.shape)).sum().backward()
    return out, x.grad, [p.grad for p in module.parameters()]


@pytest.mark.parametrize("tile", [1, 4, 50])
@pytest.mark.parametrize("frozen", ["", "x", "0.weight", "4.weight"])
@pytest.mark.parametrize("wrap", ["", "checkpointed"])
def test_equals_all_rows_at_once(tile, frozen, wrap):
    module, x = mlp(), rows()
    if frozen:
        (x if frozen == "x" else module.get_parameter(frozen)).requires_grad_(False)

    def run(x):
        return seqpar.tiled(module, x, tile=tile)

    again = lambda x: checkpoint(run, x.sin(), use_reentrant=False)  # noqa: E731
    got = gradients(module, x, again if wrap else run)
    want = gradients(module, x, lambda x: module(x.sin() if wrap else x))
    torch.testing.assert_close(got, want, **EXACT)


def test_no_row_gives_no_row_and_gradients_of_nothing():
    module, x = mlp(), rows(length=0)
    out, dx, learned = gradients(module, x, lambda x: seqpar.tiled(module, x, tile=3))
    assert out.shape == dx.shape == (2, 0, 8)
    assert not any(g.any() for g in learned)


def test_several_tensors_have_rows_and_others_are_brought_along():
    module, x, scale = mlp(), rows(), torch.rand(11, 1, dtype=torch.float64, requires_grad=True)

    def function(x, weight, *, power):
        return module(x).flatten(1) * weight**power

    x = x.detach().transpose(0, 1).contiguous().requires_grad_()
    given = {"tile": 4, "dim": 0, "modules": [module]}
    got = seqpar.tiled(lambda x, w: function(x, w, power=2), x, scale, **given)
    want = function(x, scale, power=2)
    learned = [x, scale, *module.parameters()]
    torch.testing.assert_close(got, want, **EXACT)
    torch.testing.assert_close(
        *(torch.autograd.grad(out.sin().sum(), learned) for out in (got, want)), **EXACT
    )


def test_dropout_is_the_same_in_both_passes_and_goes_on_behind():
    """Tile after tile draws what a loop over the tiles draws."""
    module, x = mlp(dropout=0.5), rows()
    torch.manual_seed(3)
    got = *gradients(module, x, lambda x: seqpar.tiled(module, x, tile=4)), torch.rand(1)
    torch.manual_seed(3)
    want = (
        *gradients(module, x, lambda x: torch.cat([module(t) for t in x.split(4, 1)], 1)),
        torch.rand(1),
    )
    torch.testing.assert_close(got, want, **EXACT)


def test_gradients_of_16_bits_are_summed_in_32():
    x, exact = rows(torch.bfloat16, 2048), mlp()
    module = mlp(torch.bfloat16)
    *_, want = gradients(exact, rows(length=2048), exact)
    errors = []
    for run in (lambda x: seqpar.tiled(module, x, tile=16), module):
        got = gradients(module, x, run)[2]
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)])
    assert all(tiled < 1.5 * whole for tiled, whole in zip(*errors, strict=True))


def test_a_hook_sees_the_gradient_of_a_parameter_once():
    module, seen = mlp(), []
    module[1].weight.register_hook(lambda g: seen.append(g) or 2 * g)
    *_, got = gradients(module, rows(), lambda x: seqpar.tiled(module, x, tile=4))
    *_, want = gradients(module, rows(), module)
    assert len(seen) == 2
    torch.testing.assert_close(got, want, **EXACT)


def test_a_parameter_that_is_not_used_keeps_no_gradient():
    module = mlp()
    module[0].bias, module.spare = nn.Parameter(torch.zeros(8).double()), nn.Linear(2, 2)
    seqpar.tiled(
        lambda x: x * module[1].bias[:8], rows(), tile=4, modules=[module]
    ).sum().backward()
    assert module.spare.weight.grad is None
    assert module[0].weight.grad is None
    torch.testing.assert_close(module[1].bias.grad[:8], rows().sum((0, 1)).detach(), **EXACT)


def test_autocast_is_that_of_forward_and_others_in_its_block_learn():
    module, x, kinds = mlp(torch.float32), rows(torch.float32), []
    module[1].register_forward_hook(lambda m, args, out: kinds.append(out.dtype))

    def run(way):
        def both(x):
            with torch.autocast("cpu", torch.bfloat16):
                return (way(x) + module(x)).float()

        return gradients(module, x, both)

    got, want = run(lambda x: seqpar.tiled(module, x, tile=4)), run(module)
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.5)
    assert kinds == [torch.bfloat16] * (3 + 1 + 3 + 2), (
        "forward, beside it, backward; and not tiled"
    )


def test_lora_learns_and_what_it_adapts_does_not():
    model = get_peft_model(mlp(), LoraConfig(target_modules=["1", "4"], init_lora_weights=False))
    model = model.double()
    got = gradients(model, rows(), lambda x: seqpar.tiled(model, x, tile=4))
    torch.testing.assert_close(got, gradients(model, rows(), model), **EXACT)
    assert sum(g is not None for g in got[2]) == 4


def test_without_gradients_nothing_is_kept():
    module = mlp()
    with torch.no_grad():
        out = seqpar.tiled(module, rows(), tile=4)
    assert not out.requires_grad
    torch.testing.assert_close(out, module(rows()).detach(), **EXACT)


ONE = mlp()


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda x: seqpar.tiled(lambda x: ONE(x), x, tile=4),
            ValueError,
            "give its module in `modules`",
        ),
        (
            lambda x: seqpar.tiled(lambda t: t * x.sum(), x, tile=4),
            ValueError,
            "or make it one of the rows",
        ),
        (lambda x: seqpar.tiled(lambda x: (x, x), x, tile=4), NotImplementedError, "got tuple"),
        (
            lambda x: seqpar.tiled(lambda x: x[:, :1], x, tile=4),
            ValueError,
            "must give 4 rows for 4",
        ),
        (
            lambda x: seqpar.tiled(ONE, x, x[:, 1:], tile=4),
            ValueError,
            "same length along dimension 1",
        ),
        (lambda x: seqpar.tiled(ONE, x, tile=4, dim=3), ValueError, "along dimension 3"),
        (lambda x: seqpar.tiled(ONE, x, tile=0), ValueError, "tile must be at least 1"),
        (lambda x: seqpar.tiled(ONE, tile=1), ValueError, "a tensor that has rows"),
        (
            lambda x: torch.autograd.grad(seqpar.tiled(ONE, x, tile=4).sum(), x, create_graph=True),
            NotImplementedError,
            "what is computed in tiles",
        ),
    ],
)
def test_what_cannot_be_tiled_is_refused(run, error, message):
    with pytest.raises(error, match=message):
        run(rows())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_mlps_of_a_model_are_tiled_in_the_block(family):
    model = FAMILIES[family].make()
    ids = torch.arange(26).view(2, 13) % VOCABULARY
    lengths = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(
            lambda m, args, out: lengths.append(args[0].shape[1])
        )

    def trained(model):
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        return logits, [p.grad for p in model.parameters()]

    want = trained(model)
    lengths.clear()
    with seqpar.tiled_mlps(model, tile=5) as names:
        copied = copy.deepcopy(model)
        torch.testing.assert_close(trained(model), want, **EXACT)
        assert lengths == [5, 5, 3] * 4, "two layers, forward and backward"
        with (
            pytest.raises(ValueError, match=r"mlp has been exchanged already"),
            seqpar.tiled_mlps(model, tile=5),
        ):
            pass
    assert names == ["model.layers.0.mlp", "model.layers.1.mlp"]
    lengths.clear()
    torch.testing.assert_close(trained(model), want, **EXACT)
    assert lengths == [13] * 2
    model.zero_grad()
    torch.testing.assert_close(trained(copied), want, **EXACT)
    assert model.lm_head.weight.grad is None, "a copy learns by itself"


def test_models_without_such_modules_and_mixtures_are_refused():
    with (
        pytest.raises(ValueError, match="no module is named 'mlp'"),
        seqpar.tiled_mlps(mlp(), tile=4),
    ):
        pass
    mixture = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleList([mlp()])})})
    with (
        pytest.raises(NotImplementedError, match="mixture of experts"),
        seqpar.tiled_mlps(mixture, tile=4),
    ):
        pass
