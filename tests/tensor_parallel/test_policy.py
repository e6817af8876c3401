"""Models under a policy equal one device: logits, loss, every gradient; whole weights are what they were."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import seqpar
from seqpar import DesyncError
from seqpar.tensor_parallel import (
    Policy,
    Rule,
    Sizes,
    apply_policy,
    clip_gradients,
    contracted,
    load_whole_state,
    megatron,
    megatron_volume,
    weights_volume,
    whole_state,
)
from seqpar.testing.models.under_policy import (
    FUSED,
    cut_step,
    farthest,
    sent,
    tiny,
    tokens,
    whole_step,
)

EXACT = 1e-11  # float64: only the summation order differs
POLICIES = {"megatron": megatron, "contracted": contracted}


def line(group):
    """The mesh of a group that exists."""
    ranks = dist.get_process_group_ranks(group.transport.process_group)
    return DeviceMesh.from_group(
        group.transport.process_group, "cpu", torch.tensor(ranks), mesh_dim_names=("tp",)
    )


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
def test_equals_one_device(four_processes, name, policy, size):
    """Llama's head is its own, with padding among the tokens; Gemma's is its embedding; Qwen3 norms heads.

    Over 3 ranks the vocabulary of 50 is uneven.
    """
    changes = {"vocab_size": 50} if size == 3 else {}
    if size == 4:
        changes |= {"num_key_value_heads": 4}
    if name != "gemma":
        changes |= {"attention_bias": True}
    logits = "sharded" if size == 3 else "whole"
    for off in four_processes.run(differences, name, policy, logits, changes, size=size):
        assert off.pop("weights") == 0
        assert max(off.values()) < EXACT, off


def family_differences(group, names):
    return {name: differences(group, name, "megatron", "whole", {}) for name in names}


@pytest.mark.parametrize("names", [list(FUSED)[:6], list(FUSED)[6:]], ids=lambda names: names[0])
def test_other_families_equal_one_device(four_processes, names):
    """Their attention, which is not the policy's, stays whole here: MLPs, embeddings and heads are cut."""
    for found in four_processes.run(family_differences, names, size=2):
        for name, off in found.items():
            assert off.pop("weights") == 0, name
            assert max(off.values()) < EXACT, (name, off)


def calls_of(group, name, **changes):
    model = tiny(name, **changes)
    step = cut_step(model, tokens(), megatron(model), line(group))
    return [[(c.kind, c.elements) for c in calls] for calls in (step.forward, step.backward)]


@pytest.mark.parametrize(("name", "blocks"), [("llama", 4), ("gpt2", 2), ("phi3", 2)])
def test_a_block_takes_one_all_reduce_each_way(four_processes, name, blocks):
    """q, k and v add up their gradients of the one input before they are reduced; so do gate and up.

    Besides there are the embedding forward and the head backward.
    """
    stream = ("all_reduce", tokens().numel() * 24)
    head = ("all_gather", tokens().numel() * 48 // 2)
    for forward, backward in four_processes.run(calls_of, name, size=2):
        assert forward == [stream] * (blocks + 1) + [head]
        assert backward == [stream] * (blocks + 1)


def adapted(name):
    import peft

    config = peft.LoraConfig(
        r=3,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        init_lora_weights=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(tiny(name), config).double()


def adapted_differences(group, policy):
    model, want = adapted("gemma"), whole_step(adapted("gemma"), tokens())
    got = cut_step(model, tokens(), POLICIES[policy](model), line(group))
    return farthest(got, want), len(got.gradients), [c.elements for c in got.backward]


@pytest.mark.parametrize("policy", POLICIES)
def test_adapters_of_peft_equal_one_device(four_processes, policy):
    for off, num_gradients, backward in four_processes.run(adapted_differences, policy, size=2):
        assert num_gradients == 2 * 7 * 2
        assert off.pop("weights") == 0
        assert max(off.values()) < EXACT, off
        if policy == "megatron":
            # The layers' inputs once a block, but for the first; A's outputs; the head's. torch 2.11 sums
            # each of them twice.
            once = torch.__version__ >= "2.13"
            assert backward.count(tokens().numel() * 24) == (4 if once else 8)


def replica_differences(_, name, axes):
    model, want = tiny(name), whole_step(tiny(name), tokens(4))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=axes)
    mine = tokens(4).chunk(2)[mesh.get_local_rank("data")]
    got = cut_step(model, mine, megatron(model), mesh)
    off = farthest(replace(got, loss=want.loss), want)
    names = dict(model.named_parameters())
    held = sum(p.to_local().numel() for p in names.values())
    sizes = Sizes.of(model.config, mine.numel())
    closed = megatron_volume(sizes, 2), weights_volume(sizes, 2, 2, is_tied=name == "gemma")
    for axis, volume in zip(("tp", "data"), closed, strict=True):
        ranks = tuple(mesh[axis].mesh.tolist())
        for direction in ("forward", "backward"):
            calls = [c for c in getattr(got, direction) if c.ranks == ranks]
            assert sent(calls) == volume.by_kind(direction), (axis, direction)
    return off, held, sum(p.numel() for p in tiny(name).parameters())


@pytest.mark.parametrize(
    ("name", "axes"),
    [("gemma", ("tp", "data")), ("qwen3", ("tp", "data")), ("gemma", ("data", "tp"))],
)
def test_weights_over_a_second_axis_equal_one_device(four_processes, name, axes):
    """Each rank has half of the rows, gradients are averaged; what each axis sends is the closed form."""
    for off, held, everything in four_processes.run(replica_differences, name, axes):
        assert off.pop("weights") == 0
        assert max(off.values()) < EXACT, off
        assert held < 0.27 * everything  # norms of heads are halved only


def given_twice(group):
    model, mesh = tiny("gemma"), line(group)
    apply_policy(model, megatron(model), mesh)
    ids = tokens()
    for _ in range(2):
        model(ids, use_cache=False).logits.square().mean().backward()
    twice = {
        n: p.grad.full_tensor() for n, p in model.named_parameters() if hasattr(p, "full_tensor")
    }
    model.zero_grad()
    model(ids, use_cache=False).logits.square().mean().backward()
    once = {
        n: p.grad.full_tensor() for n, p in model.named_parameters() if hasattr(p, "full_tensor")
    }
    return max(float((twice[n] - 2 * once[n]).abs().max()) for n in once)


def test_gradients_accumulate(four_processes):
    assert max(four_processes.run(given_twice, size=2)) < EXACT


class Gated(nn.Module):
    """A block whose norm reads the input before gate and up do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(self.gate(y).relu() * self.up(y))


class Experts(nn.Module):
    """A layer with a list of its own."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([Gated(), Gated()])

    def forward(self, x):
        return self.experts[0](x) + self.experts[1](x)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Experts(), Experts()])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def block_differences(group, is_shared):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Layers().double(), torch.randn(2, 3, 8, dtype=torch.float64)
    if is_shared:
        model.layers[1] = model.layers[0]
    want = copy.deepcopy(model)
    want(x).square().mean().backward()
    rules = (
        Rule(r".*(gate|up)\.(weight|bias)", "output"),
        Rule(r".*down\.(weight|bias)", "input"),
        Rule(r".*norm\.(weight|bias)", "replicate"),
    )
    if group.size == 2:
        mesh, mine = line(group), x
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "data"))
        mine = x.chunk(2)[mesh.get_local_rank("data")]
    apply_policy(model, Policy("mine", rules), mesh)
    model(mine).square().mean().backward()
    gradients = whole_state(model, gradients=True)
    return max(float((gradients[n] - p.grad).abs().max()) for n, p in want.named_parameters())


def test_blocks_with_a_norm_and_lists_within_lists_equal_one_device(four_processes):
    assert max(four_processes.run(block_differences, False)) < EXACT


def test_a_layer_that_is_there_twice_is_cut_once(four_processes):
    assert max(four_processes.run(block_differences, True, size=2)) < EXACT


def loaded_after_a_forward(group):
    """What is left of whole weights that are loaded between a forward alone and a step."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "data"))
    model, other = tiny("llama"), tiny("llama", initializer_range=0.1)
    apply_policy(model, megatron(model), mesh)
    with torch.no_grad():
        model(tokens(), use_cache=False)
    state = {name: p.detach() for name, p in other.named_parameters()}
    short = dict(list(state.items())[1:]) if group.rank == 1 else state
    with pytest.raises(ValueError if group.rank == 1 else DesyncError, match="missing"):
        load_whole_state(model, short)
    load_whole_state(model, state)
    model(tokens(), use_cache=False).logits.square().mean().backward()
    with torch.no_grad():
        model(tokens(), use_cache=False)
    assert whole_state(model, gradients=True).keys() == state.keys()
    found = whole_state(model)
    return max(float((found[name] - x).abs().max()) for name, x in state.items())


def test_weights_over_two_axes_are_loaded_after_a_forward_too_and_refused_on_all_ranks(
    four_processes,
):
    assert four_processes.run(loaded_after_a_forward) == [0.0] * 4


def loss_of_sharded_logits(group):
    from seqpar.integrations.transformers import SequenceParallel

    model = tiny("llama", vocab_size=50)
    apply_policy(model, megatron(model, logits="sharded"), line(group))
    sp = SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()), tp=group)
    batch = {"input_ids": tokens(), "labels": tokens() % 17}  # 16 is no class of the last rank's
    with pytest.raises(ValueError, match=r"all 50 classes, got 1[76] of them.*token_losses"):
        sp.loss(batch)

    def on_one_rank(logits, labels):
        if group.rank == 1:
            raise ValueError("not me")
        return logits.sum(-1) * labels

    with pytest.raises(ValueError if group.rank == 1 else DesyncError, match="not me"):
        sp.loss(batch, token_losses=on_one_rank)


def test_a_loss_that_takes_a_part_of_the_logits_for_all_is_refused(four_processes):
    four_processes.run(loss_of_sharded_logits, size=3)


def step_that_drops(group, policy):
    """Loss and gradients of whole weights, one device's first."""
    from seqpar.integrations.transformers import SequenceParallel

    steps = []
    for is_cut in (False, True):
        model = tiny("llama", attention_dropout=0.5).train()
        sp = SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()), tp=group)
        if is_cut:
            apply_policy(model, POLICIES[policy](model), line(group))
        loss = sp.loss({"input_ids": tokens(), "labels": tokens()}, seed=3)
        loss.backward()
        steps.append(whole_state(model, gradients=True) | {"loss": loss.detach()})
    want, got = steps
    return max(float((got[name] - x).abs().max()) for name, x in want.items())


@pytest.mark.parametrize("policy", POLICIES)
def test_attention_under_a_policy_drops_the_weights_that_one_device_drops(four_processes, policy):
    assert max(four_processes.run(step_that_drops, policy, size=2)) < EXACT


def copies_of_cut_models(group):
    """How far a copy is off the model: in a step that drops weights, and in whole weights that are halves."""
    from seqpar.integrations.transformers import SequenceParallel

    steps = []
    for is_copied in (False, True):
        model = tiny("llama", attention_dropout=0.5).train()
        names = [*model.state_dict()]
        apply_policy(model, megatron(model), line(group))
        model = copy.deepcopy(model) if is_copied else model
        assert [*model.state_dict()] == names
        sp = SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()), tp=group)
        loss = sp.loss({"input_ids": tokens(), "labels": tokens()}, seed=3)
        loss.backward()
        steps.append(whole_state(model, gradients=True) | {"loss": loss.detach()})
    halves = tiny("phi3")
    whole = {name: x.clone() for name, x in halves.state_dict().items() if "mlp" in name}
    apply_policy(halves, megatron(halves), line(group))
    attributes = [set(vars(m)) for m in halves.modules()]
    other = copy.deepcopy(halves)
    assert [set(vars(m)) for m in other.modules()] == attributes
    assert not any({"first_head", "num_dealt"} & names for names in attributes)
    steps += [whole, whole_state(other)]
    # `tiny` ties the norms of a copy to those of its original, so they have no gradients of their own.
    pairs = [
        (got[name], x)
        for want, got in (steps[:2], steps[2:])
        for name, x in want.items()
        if "norm" not in name
    ]
    return max(float((x - y).abs().max()) for x, y in pairs)


def test_a_copy_of_a_cut_model_knows_what_it_holds(four_processes):
    assert max(four_processes.run(copies_of_cut_models, size=2)) < EXACT


def beside_a_sharded_sequence(_, policy):
    """Rows over sp, weights over tp; the mean is over the 12 tokens that have a next one."""
    from seqpar.integrations.transformers import SequenceParallel

    model, want = tiny("llama"), whole_step(tiny("llama"), tokens())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "sp"))
    sp = seqpar.Group.of(mesh["sp"])
    wrapped = SequenceParallel(model, seqpar.RingAttention(sp))
    apply_policy(model, POLICIES[policy](model), mesh["tp"])
    loss = wrapped.loss({"input_ids": tokens(), "labels": tokens()}) * 12 / 14
    loss.backward()
    seqpar.sum_gradients(model.parameters(), sp)
    gradients = whole_state(model, gradients=True)
    return farthest(replace(want, loss=loss, gradients=gradients), want)


@pytest.mark.parametrize("policy", POLICIES)
def test_beside_a_sharded_sequence_it_equals_one_device(four_processes, policy):
    for off in four_processes.run(beside_a_sharded_sequence, policy):
        assert max(off.values()) < EXACT, off


def norms_of_gradients(group):
    model, want = tiny("gemma"), tiny("gemma")
    whole_step(want, tokens())
    cut_step(model, tokens(), megatron(model), line(group))
    return clip_gradients(model, group), float(
        torch.nn.utils.get_total_norm([p.grad for p in want.parameters()])
    )


def test_a_head_that_is_the_embedding_counts_once_in_the_norm(four_processes):
    for got, want in four_processes.run(norms_of_gradients, size=2):
        assert abs(got - want) < EXACT
