"""A process group or a device mesh in the place of a `Group`: one group of each, whoever is given it.

A failure here leaves modules that each keep schedules of their own, or have another group than was meant.
"""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import seqpar
from seqpar import Group, Mask
from seqpar.testing import oracle
from seqpar.testing.refusals import check_told, told

EXACT = {"rtol": 1e-11, "atol": 1e-11}
MODULES = {
    "ring": seqpar.RingAttention,
    "ulysses": seqpar.UlyssesAttention,
    "allgather": seqpar.AllGatherAttention,
    "materialised": seqpar.MaterialisedAttention,
    "mesh": seqpar.MeshAttention,
    "hybrid": seqpar.HybridAttention,
}


def mesh_of(names=("dp", "sp"), shape=(2, 2)):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def attended(attend, length):
    """(differences of out, dq, dk, dv) of this rank's rows from dense attention."""
    rank, size = attend.group.rank, attend.group.size
    layout = seqpar.zigzag(length, size)
    generator = torch.Generator().manual_seed(length)
    whole = torch.randn(4, 1, length, 4, 3, generator=generator, dtype=torch.float64)
    *whole, dout = whole
    mine = [seqpar.shard_sequence(x, layout, rank).requires_grad_() for x in whole]
    whole = [x.requires_grad_() for x in whole]
    want = oracle.attention(*whole, oracle.visible(length, True, None), oracle.Terms(3**-0.5))
    grads = torch.autograd.grad(want, whole, dout)
    positions = layout.positions(rank)
    out = attend(*mine, layout)
    got = torch.autograd.grad(out, mine, dout[:, positions])
    return [
        float((x - y[:, positions]).abs().sum())
        for x, y in zip((out, *got), (want, *grads), strict=True)
    ]


def over_torch(_, name, length, as_mesh):
    """What a module gives that is made of what torch has for its ranks."""
    causal = Mask(causal=True)
    if name in ("mesh", "hybrid"):
        attend = MODULES[name](mesh_of(("ring", "ulysses")), mask=causal)
    else:
        attend = MODULES[name](mesh_of()["sp"] if as_mesh else dist.group.WORLD, mask=causal)
    return attend.group.size, attended(attend, length)


@pytest.mark.parametrize("length", [1, 3, 13])
@pytest.mark.parametrize(
    ("name", "as_mesh"), [(n, True) for n in MODULES] + [("ring", False), ("ulysses", False)]
)
def test_modules_of_a_mesh_or_process_group_equal_one_device(four_processes, name, as_mesh, length):
    size = 2 if as_mesh and name not in ("mesh", "hybrid") else 4
    for got, differences in four_processes.run(over_torch, name, length, as_mesh):
        assert got == size
        assert max(differences) < 1e-11


def shared(_):
    mesh = mesh_of()
    attend = seqpar.RingAttention(mesh["sp"])
    batches = [{"input_ids": torch.ones(1, 4)}]
    loader = seqpar.ShardedLoader(batches, mesh["sp"], everyone=dist.group.WORLD)
    layout = seqpar.contiguous(0, 2)
    empty = torch.ones(1, 0, 1, 2)
    same = [
        seqpar.UlyssesAttention(mesh["sp"].get_group()).group is attend.group,
        loader.group is attend.group,
        seqpar.KVCache(mesh["sp"], layout, empty, empty).group is attend.group,
        seqpar.ShardedLoader(batches, mesh["sp"]).everyone is attend.group,
        loader.everyone is seqpar.RingAttention(dist.group.WORLD).group,
        loader.everyone is seqpar.HybridAttention(mesh_of(("ring", "ulysses"))).group,
    ]
    given = Group.of(mesh["sp"])
    others = [seqpar.RingAttention(given).group is given, given is not attend.group]
    assert len(list(loader)) == 1
    return same, others


def test_all_that_is_made_of_a_process_group_has_one_group(four_processes):
    for same, others in four_processes.run(shared):
        assert all(same)
        assert all(others), "a group that is given is taken as it is"


def out_of_order(_):
    """Two layers, each made of the mesh; rank 1 of the pair goes back through the first one first."""
    mesh = mesh_of()
    layout = seqpar.contiguous(4, 2)
    x = torch.ones(1, 2, 2, 4, requires_grad=True)
    outs = [seqpar.RingAttention(mesh["sp"])(x, x, x, layout) for _ in range(2)]
    order = outs if mesh["sp"].get_local_rank() else outs[::-1]
    return told(lambda: [out.sum().backward() for out in order])


def test_layers_that_are_each_given_the_mesh_notice_a_backward_in_another_order(four_processes):
    check_told(four_processes.run(out_of_order), "backward of attention number 2' on rank 0, ")


def gone(_):
    processes = dist.new_group([0, 1, 2, 3])
    alive = weakref.ref(seqpar.RingAttention(processes).group)
    gc.collect()
    kept = alive() is not None
    dist.destroy_process_group(processes)
    del processes
    gc.collect()
    return kept, alive() is not None


def test_the_group_lives_as_long_as_the_process_group(four_processes):
    """No longer: gloo's threads end with the last reference to it."""
    assert four_processes.run(gone) == [(True, False)] * 4


def refusals(_):
    mesh, three = mesh_of(), mesh_of(("dp", "ring", "ulysses"), (2, 1, 2))
    x = torch.ones(1, 2)
    return {
        "a mesh": told(lambda: seqpar.RingAttention(mesh)),
        "none": told(lambda: seqpar.RingAttention(None)),
        "a tensor": told(lambda: seqpar.RingAttention(x)),
        "a dimension for a grid": told(lambda: seqpar.HybridAttention(mesh["sp"])),
        "part of a mesh": told(lambda: seqpar.MeshAttention(three["ring", "ulysses"])),
        "a group for a grid": told(lambda: seqpar.HybridAttention(dist.group.WORLD)),
        "a mesh for a function": told(lambda: seqpar.mean_loss(x, mesh["sp"])),
        "processes for a function": told(
            lambda: seqpar.shard_batch({"input_ids": x}, dist.group.WORLD)
        ),
    }


SAID = {
    "a mesh": r"ValueError: one mesh dimension makes a group, got \('dp', 'sp'\); pass mesh\['name'\]",
    "none": "TypeError: .* got None; is torch.distributed initialised",
    "a tensor": "TypeError: expected a ProcessGroup, a DeviceMesh",
    "a dimension for a grid": "ValueError: a grid needs a 2-D device mesh",
    "part of a mesh": "ValueError: the group must have the 2 ranks of the mesh, .* pass group=",
    "a group for a grid": r"TypeError: .* a seqpar.Grid, such as group.grid\(ulysses=2\), or a 2-D device",
    "a mesh for a function": r"TypeError: mean_loss takes a seqpar.Group, such as attend.group or seqpar.G",
    "processes for a function": "TypeError: shard_batch takes a seqpar.Group",
}


def test_what_is_no_group_of_ranks_is_refused_in_words(four_processes):
    for found in four_processes.run(refusals):
        for what, pattern in SAID.items():
            check_told([found[what]], pattern)


def test_nothing_is_asked_of_torch_where_a_group_is_given():
    """Simulated ranks have no process group."""
    assert (
        seqpar.simulate(2, lambda group: seqpar.RingAttention(group).group is group) == [True] * 2
    )
