"""Grids: who is where, from degrees and from device meshes, and that both dimensions are groups."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import seqpar
from seqpar import Grid, Group, Mask, simulate
from seqpar.comm import agree, agreed, all_reduce
from seqpar.testing import oracle


def test_neighbours_are_ulysses_ranks():
    def fn(group):
        grid = group.grid(ulysses=2)
        ring, ulysses = grid.ring, grid.ulysses
        return grid.shape, (ring.rank, ring.size), (ulysses.rank, ulysses.size)

    results = simulate(6, fn)
    assert [r[0] for r in results] == [(3, 2)] * 6
    assert [r[1] for r in results] == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3)]
    assert [r[2] for r in results] == [(0, 2), (1, 2)] * 3


def both_dimensions(group):
    """Reductions and agreement within a row and within a column, and what they count."""
    grid = group.grid(ring=2)
    rows = all_reduce(torch.tensor([float(group.rank)]), grid.ulysses)
    cols = all_reduce(torch.tensor([float(group.rank)]), grid.ring)
    text = "agreed"
    try:
        agree(grid.ulysses, {"row": 0 if group.rank == 1 else 1})
    except seqpar.DesyncError as error:
        text = str(error)
    return float(rows), float(cols), text, group.traffic.total.elements


def check(results):
    assert [r[0] for r in results] == [3.0, 3.0, 3.0, 12.0, 12.0, 12.0]
    assert [r[1] for r in results] == [3.0, 5.0, 7.0] * 2
    assert [r[2] for r in results[3:]] == ["agreed"] * 3
    assert all("row is 1 on ranks 0, 2, 0 on rank 1" in r[2] for r in results[:3])
    assert all(r[3] == 2 + 1 for r in results)


def test_both_dimensions_are_groups_and_count_in_the_whole(worlds):
    check(simulate(6, both_dimensions))
    check(worlds.run(6, both_dimensions))


def on_a_mesh(group, names, shape):
    """Attention over the grid of a device mesh, of this rank's rows; and where the grid puts the rank."""
    mesh = DeviceMesh("cpu", torch.arange(group.size).view(shape), mesh_dim_names=names)
    grid = Grid.of(mesh)
    layout = seqpar.striped(20, group.size)
    q = torch.randn(1, 20, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = seqpar.shard_sequence(q, layout, group.rank)
    hybrid = seqpar.HybridAttention(grid, mask=Mask(causal=True))(mine, mine, mine, layout)
    meshed = seqpar.MeshAttention(grid, mask=Mask(causal=True))(mine, mine, mine, layout)
    terms = oracle.Terms(3**-0.5)
    want = oracle.attention(q, q, q, oracle.visible(20, True, None), terms)
    want = want[:, layout.positions(group.rank)]
    error = max(float((x - want).abs().max()) for x in (hybrid, meshed))
    return grid.index_of(group.rank), grid.shape, error


@pytest.mark.parametrize(
    ("names", "shape", "grid"),
    [
        (("ring", "ulysses"), (2, 4), (2, 4)),
        (("ulysses", "ring"), (2, 4), (4, 2)),
        (None, (4, 2), (4, 2)),
    ],
)
def test_a_device_mesh_makes_a_grid(worlds, names, shape, grid):
    for rank, (index, found, error) in enumerate(worlds.run(8, on_a_mesh, names, shape)):
        first, second = divmod(rank, shape[1])
        swapped = names is not None and names[0] == "ulysses"
        assert index == ((second, first) if swapped else (first, second))
        assert found == grid
        assert error < 1e-12


def refusals(group):
    """What a mesh that makes no grid is told."""
    texts = []
    for ranks, of in ((torch.arange(8), group), (torch.arange(8).view(2, 4), Group.alone())):
        try:
            Grid.of(DeviceMesh("cpu", ranks), of)
        except ValueError as error:
            texts.append(str(error))
    return texts


def test_meshes_that_make_no_grid_are_refused(worlds):
    for one_dim, other_ranks in worlds.run(8, refusals):
        assert "a grid needs a 2-D device mesh" in one_dim
        assert (
            "the group must have the 8 ranks of the mesh, got Group(rank=0, size=1)" in other_ranks
        )


def refused(group, *, claims=None, at_fault=None):
    """What a rank of a 2 x 2 grid raises where one rank refuses, or ranks make these claims."""
    grid = group.grid(ulysses=2)
    try:
        with agreed(grid.ulysses, grid.ring, operation="test") as claim:
            claim["x"] = claims and claims[group.rank]
            if group.rank == at_fault:
                raise ValueError("too long")
    except (ValueError, seqpar.DesyncError) as error:
        return error
    return None


@pytest.mark.parametrize("at_fault", range(4))
def test_what_one_rank_refuses_all_ranks_of_a_grid_refuse(at_fault):
    errors = simulate(4, lambda group: refused(group, at_fault=at_fault))
    assert isinstance(errors.pop(at_fault), ValueError)
    assert all(isinstance(error, seqpar.DesyncError) for error in errors)
    assert all("ValueError: too long" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("claims", "differ"),
    [
        ("aabb", "x is 'a' on rank 0, 'b' on rank 1"),  # along the ring only
        ("abab", "x is 'a' on rank 0, 'b' on rank 1"),  # along ulysses only
        ("aaab", "x is 'a' on rank 0, 'b' on rank 1"),
        ("abbb", "x is 'a' on rank 0, 'b' on rank 1"),
    ],
)
def test_claims_that_differ_along_one_axis_stop_all_ranks(claims, differ):
    """Also those whose own neighbours agree: they hear it along the other axis."""
    errors = simulate(4, lambda group: refused(group, claims=claims))
    assert all(isinstance(error, seqpar.DesyncError) for error in errors)
    assert all(differ in str(error) for error in errors)


def test_ranks_that_agree_along_all_axes_go_on():
    assert simulate(4, lambda group: refused(group, claims="aaaa")) == [None] * 4


@pytest.mark.parametrize(("size", "rounds"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3)])
def test_agreement_sends_two_numbers_in_each_of_log_p_rounds(size, rounds):
    def fn(group):
        with agreed(group, operation="test"):
            pass
        return group.traffic.agreement.elements

    assert simulate(size, fn) == [2 * rounds] * size
