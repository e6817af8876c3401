"""What ranks send under a policy is counted, and equals the closed form; it tells of a wrong axis."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from seqpar.comm import all_reduce
from seqpar.tensor_parallel import (
    Policy,
    Sizes,
    contracted,
    contracted_volume,
    megatron,
    megatron_volume,
)
from seqpar.tensor_parallel.collectives import Collective, Collectives, sent_fraction
from seqpar.testing.models.under_policy import cut_step, farthest, sent, tiny, tokens, whole_step

BUILT_IN = {"megatron": (megatron, megatron_volume), "contracted": (contracted, contracted_volume)}
# Gemma-7B, and what has its ratios but no more than 12 heads.
GEMMA = Sizes(8192, 3072, 16, 16, 256, 24576, 256_000, layers=28)
SCALED = {"hidden_size": 36, "head_dim": 4, "intermediate_size": 288, "num_key_value_heads": 12}


def line(group):
    ranks = dist.get_process_group_ranks(group.transport.process_group)
    return DeviceMesh.from_group(
        group.transport.process_group, "cpu", torch.tensor(ranks), mesh_dim_names=("tp",)
    )


def counted(group, name, policy, logits, changes):
    """What this rank sent, and the closed form, each forward and backward."""
    model = tiny(name, **changes)
    make, volume = BUILT_IN[policy]
    sharded = group if logits == "sharded" else None
    step = cut_step(model, tokens(), make(model, logits=logits), line(group), sharded, 48)
    closed = volume(Sizes.of(model.config, tokens().numel()), group.size, logits=logits)
    return (
        (sent(step.forward), sent(step.backward)),
        (closed.by_kind("forward"), closed.by_kind("backward")),
    )


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("policy", BUILT_IN)
def test_counted_volume_is_the_closed_form(worlds, policy, size):
    """Gemma, whose logits are whole, in the ratios of Gemma-7B."""
    for got, want in worlds.run(size, counted, "gemma", policy, "whole", SCALED):
        assert got == want


@pytest.mark.parametrize("policy", BUILT_IN)
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_grouped_heads_norms_and_sharded_logits_are_in_it(worlds, name, policy):
    for got, want in worlds.run(3, counted, name, policy, "sharded", {}):
        assert got == want


def ratios(sizes, size):
    """Contracted over Megatron in the layers, forward and in all."""
    parts = [volume(sizes, size).sent("layers") for _, volume in BUILT_IN.values()]
    (forward, backward), (more_forward, more_backward) = parts
    return more_forward / forward, (more_forward + more_backward) / (forward + backward)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_contracted_sends_ten_times_what_megatron_sends_for_gemma_7b(size):
    forward, everything = ratios(GEMMA, size)
    assert (round(float(forward), 1), round(float(everything), 1)) == (10.0, 7.3)


def layers_sent(group, policy):
    """Elements that the blocks' own all-reduces send, forward and backward: not embedding, norms or head."""
    model = tiny("gemma", **SCALED)
    make, volume = BUILT_IN[policy]
    step = cut_step(model, tokens(), make(model), line(group))
    closed = volume(Sizes.of(model.config, tokens().numel()), group.size)
    other = [sum(closed.sent(part)[i] for part in ("embedding", "norms", "head")) for i in (0, 1)]
    return [
        sum(c.sent for c in calls) - rest
        for calls, rest in zip((step.forward, step.backward), other, strict=True)
    ]


def test_the_ratios_of_gemma_7b_are_counted_at_its_proportions(worlds):
    """D : n h : F = 3 : 4 : 24."""
    (forward, backward), (more_forward, more_backward) = (
        worlds.run(2, layers_sent, policy)[0] for policy in BUILT_IN
    )
    assert round(float(more_forward / forward), 1) == 10.0
    assert round(float((more_forward + more_backward) / (forward + backward)), 1) == 7.3


def swapped(policy, split, projection):
    """The policy with one projection cut along the other axis; what it reads and writes stays."""
    path = rf".*\.{projection}\.weight"
    rules = []
    for rule in policy.rules:
        rules.append(replace(rule, pattern=f"(?!{path}$)(?:{rule.pattern})"))
        if rule.split in ("input", "output") and rule.split != split:
            reads, writes = rule.forms
            both = f"(?={path}$)(?:{rule.pattern})"
            rules.append(
                replace(rule, pattern=both, split=split, reads=reads, writes=writes, unit=None)
            )
    return rules


def with_one_axis_swapped(group, policy, projection, split):
    model, want = tiny("gemma"), whole_step(tiny("gemma"), tokens())
    make, volume = BUILT_IN[policy]
    rules = swapped(make(model), split, projection)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    used = tuple(rule for rule in rules if any(map(rule.matches, names)))
    got = cut_step(model, tokens(), Policy("swapped", used), line(group))
    closed = volume(Sizes.of(model.config, tokens().numel()), group.size)
    off = farthest(got, want)
    off["logits"] = float((got.logits - want.logits).detach().abs().max())
    return (
        off,
        (sent(got.forward), sent(got.backward)),
        (
            closed.by_kind("forward"),
            closed.by_kind("backward"),
        ),
    )


@pytest.mark.parametrize(
    ("policy", "projection", "split"),
    [
        ("megatron", "down_proj", "output"),
        ("megatron", "q_proj", "input"),
        ("contracted", "up_proj", "output"),
        ("contracted", "o_proj", "input"),
    ],
)
def test_only_the_volume_tells_of_a_wrong_axis(worlds, policy, projection, split):
    """The numbers of a model with one axis swapped are right to the last digits."""
    for off, got, want in worlds.run(2, with_one_axis_swapped, policy, projection, split):
        assert off.pop("weights") == 0
        assert max(off.values()) < 1e-11, off
        assert got != want
        if policy == "megatron":
            assert sum(sum(x.values()) for x in got) > sum(sum(x.values()) for x in want)


def test_sizes_that_do_not_divide_have_no_closed_form():
    with pytest.raises(ValueError, match=r"multiples of the 3 ranks.*'heads': 16"):
        megatron_volume(GEMMA, 3)


def counts_of_all_kinds(group):
    """A nest of counters round collectives of DTensor, of a Group, and of backward; on 3 ranks."""
    mesh = line(group)
    x = torch.ones(6, requires_grad=True)
    with Collectives() as outer:
        with Collectives() as inner:
            whole = DTensor.from_local(x, mesh, [Shard(0)]).redistribute(placements=[Replicate()])
            y = all_reduce(whole.to_local(), group)
        with Collectives() as backward:
            y.sum().backward()
        scattered = torch.empty(2)
        dist.reduce_scatter_tensor(scattered, torch.ones(6), group=mesh.get_group())
    ranks = tuple(range(group.size))
    assert inner.calls == [Collective("all_gather", 6, ranks), Collective("all_reduce", 18, ranks)]
    assert backward.calls == []
    assert outer.calls == [*inner.calls, Collective("reduce_scatter", 6, ranks)]
    assert outer.on([0, 1]) == []
    assert outer.sent() == {"all_gather": 12, "all_reduce": 24, "reduce_scatter": 4}
    assert outer.calls_by_kind()["all_reduce"] == 1
    with Collectives() as unknown, pytest.raises(NotImplementedError, match="cannot be counted"):
        dist.reduce(torch.ones(1), 0, group=mesh.get_group())
    assert unknown.calls == []


def test_counters_nest_and_refuse_what_they_do_not_know(worlds):
    worlds.run(3, counts_of_all_kinds)


def test_one_rank_sends_nothing():
    kinds = "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"
    assert [sent_fraction(kind, 1) for kind in kinds] == [0] * len(kinds)
