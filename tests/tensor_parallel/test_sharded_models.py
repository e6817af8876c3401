"""Models sharded whole, heads, MLPs and vocabulary over tp and sequences over sp, equal one device."""

from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils import logging

import seqpar
from seqpar.integrations.transformers import SequenceParallel
from seqpar.tensor_parallel import (
    apply_policy,
    load_whole_state,
    megatron,
    replace_attention,
    whole_state,
)
from seqpar.testing.models.fused import FUSED, exactly
from seqpar.testing.models.sharded import sharded_step
from seqpar.testing.models.tiny import batch_of
from seqpar.testing.models.training_step import differences, one_device

EXACT = 1e-11  # float64: only the summation order differs


def farthest(group, name, tp, **options):
    logging.set_verbosity_error()  # DBRX's parts of a config are no models, of which it warns
    mesh = init_device_mesh("cpu", (group.size // tp, tp), mesh_dim_names=("sp", "tp"))
    family = FUSED[name]
    with exactly():
        model, batch = family.make(), batch_of(2, 13)
        want = one_device(model, batch, family.labels, "eager")
        return differences(sharded_step(mesh, model, batch, **options), want)


@pytest.mark.parametrize("name", FUSED)
def test_a_model_sharded_over_sp_x_tp_equals_one_device(four_processes, name):
    for off in four_processes.run(farthest, name, 2):
        assert max(off.values()) <= EXACT, off


@pytest.mark.parametrize("name", ["bloom", "phi3_medium", "gpt_neox"])
def test_a_model_sharded_over_tp_4_equals_one_device(four_processes, name):
    """Phi-3-medium has 10 kv heads: ranks hold them unevenly, and copies."""
    for off in four_processes.run(farthest, name, 4):
        assert max(off.values()) <= EXACT, off


def test_heads_that_divide_may_be_cut_by_torchs_styles_beside_a_sharded_sequence(four_processes):
    for off in four_processes.run(partial(farthest, replaces=False), "qwen3", 2):
        assert max(off.values()) <= EXACT, off


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logits_may_stay_sharded_by_vocabulary(four_processes, name):
    for off in four_processes.run(partial(farthest, logits="sharded"), name, 2):
        assert max(off.values()) <= EXACT, off


def same_bytes(group, name):
    """A model sharded over tp = 4: its whole state, and that state loaded into another, sharded too."""
    logging.set_verbosity_error()
    mesh = init_device_mesh("cpu", (group.size,), mesh_dim_names=("tp",))
    model, other = FUSED[name].make(), FUSED[name].make(spread=0.1)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    both = [replace_attention(m, tp=seqpar.Group.of(mesh)) for m in (model, other)]
    for m in (model, other):
        apply_policy(m, megatron(m), mesh)
    same = []
    for replaced in both:
        whole = replaced.state_dict()
        assert whole.keys() == state.keys()
        same.append(all(torch.equal(whole[n], x) for n, x in state.items()))
    both[1].load_state_dict(state)
    whole = both[1].state_dict()
    return [*same, all(torch.equal(whole[n], x) for n, x in state.items())]


@pytest.mark.parametrize("name", ["phi3_medium", "gpt2", "falcon_7b"])
def test_the_whole_state_of_a_sharded_model_is_that_of_the_model(four_processes, name):
    """Phi-3's gate and up are one weight, whose halves are dealt; GPT-2's weights are transposed."""
    for same in four_processes.run(same_bytes, name):
        assert same == [True, False, True]


def refusals(group):
    mesh = init_device_mesh("cpu", (group.size,), mesh_dim_names=("tp",))
    model = FUSED["llama"].make(num_key_value_heads=4)
    apply_policy(model, megatron(model), mesh)
    before = whole_state(model)
    errors = []
    for change in ({"extra": torch.ones(1)}, {"lm_head.weight": torch.ones(3, 3)}):
        try:
            load_whole_state(model, before | (change if group.rank == 1 else {}))
        except (ValueError, seqpar.DesyncError) as error:
            errors.append(f"{type(error).__name__} {error}")
    after = whole_state(model)
    try:
        SequenceParallel(
            model, seqpar.RingAttention(seqpar.Group.alone()), tp=seqpar.Group.of(mesh)
        ).shard(batch_of(1, 9 + group.rank))
    except seqpar.DesyncError as error:
        errors.append(str(error))
    return errors, all(torch.equal(after[n], x) for n, x in before.items())


def test_states_that_do_not_fit_and_other_batches_are_refused_on_all_ranks(four_processes):
    for rank, (errors, untouched) in enumerate(four_processes.run(refusals)):
        extra, shape, batch = errors
        assert "unexpected ['extra']" in extra
        assert "lm_head.weight must be (64, 48), got (3, 3)" in shape
        assert extra.startswith("ValueError" if rank == 1 else "DesyncError")
        assert "batch['input_ids']" in batch
        assert untouched
