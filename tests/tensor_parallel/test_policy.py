"""Models under a policy equal one device: logits, loss, every gradient; whole weights are what they were."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hf.under_policy import FUSED, cut_step, farthest, tiny, tokens, whole_step
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqpar.tensor_parallel import apply_policy, contracted, megatron
from seqpar.testing import ProcessWorld

EXACT = 1e-11  # float64: only the summation order differs
POLICIES = {"megatron": megatron, "contracted": contracted}


@pytest.fixture(scope="module")
def world():
    """Four processes of their own, which can be a mesh of two axes."""
    with ProcessWorld(4) as world:
        yield world


def line(group):
    """The mesh of a group that exists."""
    ranks = dist.get_process_group_ranks(group.transport._group)
    return DeviceMesh.from_group(group.transport._group, "cpu", torch.tensor(ranks), mesh_dim_names=("tp",))


def differences(group, name, policy, logits, changes):
    model, want = tiny(name, **changes), tiny(name, **changes)
    vocabulary = model.config.vocab_size
    ids = tokens(vocabulary=vocabulary)
    want = whole_step(want, ids)
    sharded = group if logits == "sharded" else None
    cut = POLICIES[policy](model, logits=logits)
    got = cut_step(model, ids, cut, line(group), sharded, vocabulary)
    if logits == "sharded":
        want = replace(want, logits=want.logits.chunk(group.size, -1)[group.rank])
    off = farthest(got, want)
    assert got.logits.shape == want.logits.shape
    return off | {"logits": float((got.logits - want.logits).detach().abs().max())}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3"])
def test_equals_one_device(world, name, policy, size):
    """Llama's head is its own, with padding among the tokens; Gemma's is its embedding; Qwen3 norms heads.

    Over 3 ranks the vocabulary of 50 is uneven.
    """
    changes = {"vocab_size": 50} if size == 3 else {}
    if size == 4:
        changes |= {"num_key_value_heads": 4}
    if name != "gemma":
        changes |= {"attention_bias": True}
    logits = "sharded" if size == 3 else "whole"
    for off in world.run(differences, name, policy, logits, changes, size=size):
        assert off.pop("weights") == 0
        assert max(off.values()) < EXACT, off
