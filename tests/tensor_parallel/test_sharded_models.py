"""Models sharded whole, heads, MLPs and vocabulary over tp and sequences over sp, equal one device."""

import pytest
from hf.families import batch_of
from hf.fused import FUSED, exactly
from hf.sharded import sharded_step
from hf.step import differences, one_device
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils import logging

from seqpar.testing import ProcessWorld

EXACT = 1e-11  # float64: only the summation order differs


@pytest.fixture(scope="module")
def world():
    with ProcessWorld(4) as world:
        yield world


def farthest(group, name, tp, replaces):
    logging.set_verbosity_error()  # DBRX's parts of a config are no models, of which it warns
    mesh = init_device_mesh("cpu", (group.size // tp, tp), mesh_dim_names=("sp", "tp"))
    family = FUSED[name]
    with exactly():
        model, batch = family.make(), batch_of(2, 13)
        want = one_device(model, batch, family.labels, "eager")
        return differences(sharded_step(mesh, model, batch, replaces=replaces), want)


@pytest.mark.parametrize("name", FUSED)
def test_a_model_sharded_over_sp_x_tp_equals_one_device(world, name):
    for off in world.run(farthest, name, 2, True):
        assert max(off.values()) <= EXACT, off


@pytest.mark.parametrize("name", ["bloom", "phi3_medium", "gpt_neox"])
def test_a_model_sharded_over_tp_4_equals_one_device(world, name):
    """Phi-3-medium has 10 kv heads: ranks hold them unevenly, and copies."""
    for off in world.run(farthest, name, 4, True):
        assert max(off.values()) <= EXACT, off


def test_heads_that_divide_may_be_cut_by_torchs_styles_beside_a_sharded_sequence(world):
    for off in world.run(farthest, "qwen3", 2, False):
        assert max(off.values()) <= EXACT, off
