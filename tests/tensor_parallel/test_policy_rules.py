"""Every weight has one rule and every rule a weight; what cannot be cut is refused on every rank, in time."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from seqpar import DesyncError
from seqpar.tensor_parallel import Policy, Rule, apply_policy, contracted, megatron
from seqpar.tensor_parallel.policies import FUSED, SEPARATE
from seqpar.testing.models.under_policy import parameters_of, tiny


class Block(nn.Module):
    """Two layers with an adapter between them that has cut itself."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 6), nn.Linear(6, 4, bias=False)
        self.own = nn.Linear(4, 4)
        self.own.is_tensor_parallel = True


INTO, OUT = Rule(r"into\.(weight|bias)", "output"), Rule(r"out\.weight", "input")


def assign(*rules):
    return Policy("mine", rules).assign(Block())


def test_every_weight_that_is_not_cut_already_is_assigned():
    assert assign(INTO, OUT) == {"into.weight": INTO, "into.bias": INTO, "out.weight": OUT}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((INTO,), r"out\.weight \(4, 6\) is matched by no rule"),
        ((INTO, OUT, Rule(r"o.*", "replicate")), r"out\.weight.*'out.*' \(input\) and 'o\.\*' \(replicate\)"),
        ((INTO, OUT, Rule(r".*gate\.weight", "output")), r"match no weight: '\.\*gate"),
        ((INTO, OUT, Rule(r"own\.weight", "replicate")), r"match no weight: 'own"),
        ((INTO, Rule("out", "input")), r"out\.weight \(4, 6\) is matched by no rule"),
        (
            (Rule(r"into\.weight", "output"), Rule(r"into\.bias", "replicate"), OUT),
            r"all weights of into, got 'into\\\\\.weight' and 'into\\\\\.bias'",
        ),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        assign(*rules)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "columns"), "split must be one of.*'columns'"),
        (("x", "output", "half"), "reads must be one of.*'half'"),
        (("(", "output"), "no regular expression"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule(*arguments)


def test_models_that_are_not_known_are_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"contracted serves.*llama.*got GPT2.*'gpt2'"):
        contracted(tiny("gpt2"))
    with pytest.raises(NotImplementedError, match="got Block of type None"):
        megatron(Block())
    assert not FUSED & SEPARATE


def refusal(group, make, kind, message):
    """What this rank raises, and whether its model is as it was."""
    model, policy = make(group.rank)
    ranks = dist.get_process_group_ranks(group.transport.process_group)
    mesh = DeviceMesh.from_group(
        group.transport.process_group, "cpu", torch.tensor(ranks), mesh_dim_names=("tp",)
    )
    before = parameters_of(model)
    with pytest.raises(kind, match=message):
        apply_policy(model, policy, mesh)
    return parameters_of(model) == before


def of_family(name, **changes):
    model = tiny(name, **changes)
    return model, megatron(model)


def grouped(_):
    return of_family("llama", num_key_value_heads=4, head_dim=6)


def narrow(_):
    return of_family("llama", intermediate_size=32)


def few_words(_):
    return of_family("gemma", vocab_size=4)


def pairs_of_odd(_):
    return of_family("phi3", intermediate_size=25)


def fused(_):
    model = tiny("gpt2")
    for module in model.modules():
        module.is_tensor_parallel = False
    return model, megatron(model)


def tied_apart(_):
    model = tiny("gemma")
    rules = [rule for rule in megatron(model).rules if rule.split != "vocabulary"]
    apart = Rule(r".*embed_tokens\.weight", "width"), Rule(r"lm_head\.weight", "vocabulary")
    return model, Policy("apart", (*rules, *apart))


def norm_by_output(_):
    return Block(), Policy("mine", (Rule(r"(into|out)\.(weight|bias)", "width"),))


def no_policy(_):
    return tiny("llama"), megatron


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (no_policy, TypeError, r"by a Policy, such as megatron\(model\), got megatron of type function"),
        (grouped, ValueError, r"k_proj has 4 heads of 6.*3 ranks.*replace_attention"),
        (narrow, ValueError, r"gate_proj has 32 features by output, which 3 ranks"),
        (few_words, ValueError, r"vocabulary of 4 leaves some of 3 ranks without a class"),
        (pairs_of_odd, ValueError, r"gate_up_proj has 50 features by paired output"),
        (fused, ValueError, r"c_attn.* \(24, 72\).*one weight.*3 ranks.*replace_attention"),
        (tied_apart, ValueError, r"same way.* 1 for model\.embed_tokens\.weight, 0 for lm_head"),
        (norm_by_output, NotImplementedError, r"into is a Linear, which policy mine cannot cut by 'width'"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_on_every_rank_and_nothing_changed(
    worlds, make, kind, message
):
    assert worlds.run(3, refusal, make, kind, message) == [True] * 3


def other_weights(rank):
    block = Block()
    with torch.no_grad():
        for p in block.parameters():
            p.fill_(1.0)
        block.into.weight[0, 0] += rank
    return block, Policy("mine", (INTO, OUT))


def other_seeds(rank):
    block, _ = other_weights(0)
    block.drop = nn.Dropout(0.1)
    torch.manual_seed(rank)
    return block, Policy("mine", (INTO, OUT))


def other_seeds_of_a_function(rank):
    """As Bloom's blocks: dropout is called, with a number that the module holds."""
    block, _ = other_weights(0)
    block.hidden_dropout = 0.1
    torch.manual_seed(rank)
    return block, Policy("mine", (INTO, OUT))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_weights, "weights is"),
        (other_seeds, "seed of dropout is 0 on rank 0, 1 on rank 1"),
        (other_seeds_of_a_function, "seed of dropout is 0 on rank 0, 1 on rank 1"),
    ],
)
def test_ranks_that_differ_are_told(worlds, make, message):
    assert worlds.run(2, refusal, make, DesyncError, message) == [True] * 2


def refused_on_one(rank):
    block, policy = other_weights(0)
    if rank == 1:
        policy = Policy("mine", (INTO,))
    return block, policy


def refused_by_another(group):
    kind, message = (
        (DesyncError, "rank 1: ValueError.*no rule") if group.rank != 1 else (ValueError, "no rule")
    )
    return refusal(group, refused_on_one, kind, message)


def test_what_one_rank_refuses_all_refuse(worlds):
    assert worlds.run(3, refused_by_another) == [True] * 3


def cut_twice(group):
    block, policy = other_weights(0)
    ranks = dist.get_process_group_ranks(group.transport.process_group)
    mesh = DeviceMesh.from_group(
        group.transport.process_group, "cpu", torch.tensor(ranks), mesh_dim_names=("tp",)
    )
    apply_policy(block, policy, mesh)
    with pytest.raises(ValueError, match="sharded already"):
        apply_policy(block, policy, mesh)


def test_a_second_policy_is_refused(worlds):
    worlds.run(2, cut_twice)


def test_a_policy_needs_a_mesh():
    with pytest.raises(TypeError, match="DeviceMesh, got <class 'int'>"):
        apply_policy(Block(), Policy("mine", (INTO, OUT)), 2)
