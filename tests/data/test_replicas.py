"""Ranks that should share weights are held to it, to the bit."""

import pytest
import torch
from torch import nn

import seqpar
from seqpar import DesyncError, simulate

LAST = torch.tensor([1.0, torch.nan, -0.0])


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)).to(dtype)
    with torch.no_grad():
        model[1].bias.copy_(LAST)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_weights_pass(dtype):
    models = [model_of(dtype) for _ in range(3)]
    simulate(3, lambda group: seqpar.same_weights(models[group.rank], group))


def last_bit(weight):
    weight.view(torch.int32)[2, 4] ^= 1


def swapped(weight):
    weight[:, [0, 3]] = weight[:, [3, 0]]


def two_swapped_bits(weight):
    """The sum of all words stays what it was."""
    words = weight.view(torch.int32)
    words[0, 0] += 2
    words[0, 2] -= 2


@pytest.mark.parametrize("change", [last_bit, swapped, two_swapped_bits])
def test_the_first_that_differs_is_named_on_every_rank(change):
    models = [model_of() for _ in range(3)]
    with torch.no_grad():
        change(models[1][0].weight)

    def fn(group):
        with pytest.raises(
            DesyncError, match=r"same_weights: the hash of 0\.weight is .* on rank 1"
        ):
            seqpar.same_weights(models[group.rank], group)
        seqpar.same_weights(models[group.rank], group, broadcast=True)
        seqpar.same_weights(models[group.rank], group)
        return models[group.rank][0].weight.detach().clone()

    for weight in simulate(3, fn):
        assert torch.equal(weight, model_of()[0].weight)


def test_models_of_other_shapes_are_refused():
    def fn(group):
        with pytest.raises(DesyncError, match=r"weight is \(\(2, 4\)"):
            seqpar.same_weights(nn.Linear(4 + group.rank, 2), group, broadcast=True)
        return True

    assert all(simulate(2, fn))
