"""The norm of a gradient whose parts are on several ranks, and clipping by it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import seqpar
from seqpar.tensor_parallel import FusedQKV, Names, ParallelAttention, clip_gradients
from seqpar.testing import ProcessWorld

LENGTH, WIDTH = 9, 12
QKV = FusedQKV.contiguous(5, 4, 1, bias=True)


class Model(nn.Module):
    def __init__(self, tp):
        super().__init__()
        attention = seqpar.RingAttention(seqpar.Group.alone(), mask=seqpar.Mask(causal=True))
        norms = {n: nn.LayerNorm(4, dtype=torch.float64) for n in ("q_norm", "k_norm")}
        self.attention = ParallelAttention(
            QKV, WIDTH, attention=attention, tp=tp, names=Names(("qkv",), "out"), out_bias=True,
            dtype=torch.float64, **norms,
        )  # fmt: skip
        self.attention.reset_parameters(1)
        generator = torch.Generator().manual_seed(2)
        self.up, self.down = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))
        for p in (*self.up.parameters(), *self.down.parameters()):
            nn.init.normal_(p, generator=generator)

    def forward(self, x):
        x = x + self.attention(x, seqpar.contiguous(LENGTH, 1))
        return self.down(torch.relu(self.up(x)))


def clipped(tp, max_norm, shard=lambda model: None):
    """The norm, and the whole gradients of attention after it."""
    model = Model(tp)
    shard(model)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    model(x).square().sum().backward()
    norm = clip_gradients(model, tp, max_norm)
    gradients = copy.deepcopy(model.attention)
    with torch.no_grad():
        for p, q in zip(gradients.parameters(), model.attention.parameters(), strict=True):
            p.copy_(q.grad)
    return norm, gradients.whole_state()


def one_device(max_norm):
    (result,) = seqpar.simulate(1, clipped, max_norm)
    return result


def check(results, max_norm):
    want, gradients = one_device(max_norm)
    for norm, found in results:
        assert norm == pytest.approx(want, rel=1e-12)
        for name, x in gradients.items():
            torch.testing.assert_close(found[name], x, rtol=1e-11, atol=1e-12)


def test_the_norm_of_one_device_is_that_of_torch():
    model = Model(seqpar.Group.alone())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    parts = copy.deepcopy(model)
    for p, q in zip(parts.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    want = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert clip_gradients(parts, seqpar.Group.alone(), 0.5) == pytest.approx(float(want), rel=1e-12)
    for p, q in zip(parts.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_copies_and_replicated_weights_count_once(max_norm):
    for size in (2, 3, 5):
        check(seqpar.simulate(size, clipped, max_norm), max_norm)


def shard_mlp(model):
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def clipped_with_styles(group, max_norm):
    return clipped(group, max_norm, shard_mlp)


def test_shards_of_torchs_styles_count_each():
    with ProcessWorld(2) as world:
        check(world.run(clipped_with_styles, 0.5), 0.5)


def test_a_norm_that_is_none_is_refused():
    with pytest.raises(ValueError, match="max_norm must be positive, got 0"):
        clip_gradients(nn.Linear(1, 1), seqpar.Group.alone(), 0)
