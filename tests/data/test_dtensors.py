"""DTensors are refused on every rank, before a message, with code that gives their rows, and that is right.

A failure here takes a whole length for that of a shard, or tells to shard a DTensor once more.
"""

import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import seqpar
from seqpar import Mask
from seqpar.testing import oracle
from seqpar.testing.refusals import check_told, told

SIZE = 4


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mesh_of():
    return init_device_mesh("cpu", (SIZE,), mesh_dim_names=("sp",))


def refused(group, only):
    """What each call says that is given a DTensor, by all ranks or by one; and what it has sent."""
    mesh, found = mesh_of(), {}
    layout = seqpar.contiguous(12, SIZE)
    x, e = rand(1, 12, 2, 4), rand(1, 12, 8)
    rows, e_rows = (seqpar.shard_sequence(y, layout, group.rank) for y in (x, e))
    attend = seqpar.RingAttention(group)
    layer = seqpar.MultiheadAttention(8, 2, attend, dtype=torch.float64)
    calls = {
        "q": (x, rows, lambda d: attend(d, rows, rows, layout)),
        "k": (x, rows, lambda d: attend(rows, d, rows, layout)),
        "v": (x, rows, lambda d: attend(rows, rows, d, layout)),
        "query": (e, e_rows, lambda d: layer(d, layout=layout)),
        "key": (e, e_rows, lambda d: layer(e_rows, d, layout=layout)),
        "x": (x, rows, lambda d: seqpar.unshard_sequence(d, layout, group)),
        "input_ids": (e, e, lambda d: seqpar.shard_batch({"input_ids": d}, group)),
        "k of a cache": (x, rows, lambda d: seqpar.KVCache(group, layout, d, rows)),
    }
    for name, (whole, plain, call) in calls.items():
        given = distribute_tensor(whole, mesh, [Shard(1)])
        group.traffic.reset()
        mine = given if only in (None, group.rank) else plain
        found[name] = told(lambda call=call, mine=mine: call(mine)), group.traffic.total.elements
        with torch.no_grad():
            call(plain)  # nothing is left on the wire
    return found


@pytest.mark.parametrize("only", [None, 2])
def test_dtensors_are_refused_on_every_rank_before_a_message(four_processes, only):
    for found in four_processes.run(refused, only):
        for name, (text, elements) in found.items():
            name = name.split()[0]
            what = f"TypeError: {name} is a DTensor, .*Shard.*1.* of .1, 12, .*{name}.to_local.., "
            what += r".*seqpar.contiguous\(12, 4\)"
            check_told([text], what)
            assert elements == 0


def advised(call):
    """The code of a refusal that gives the rows, and that which gives their layout."""
    text = told(call)
    rows = re.search(r"give (\S+\)), with|already is (\S+\)), of", text)
    layout = re.search(r"seqpar\.contiguous\([^)]*\)", text)
    assert rows, text
    assert layout, text
    return rows[1] or rows[2], layout[0]


def by_advice(group, length, placement):
    """Differences of out, dq, dk, dv from dense attention, where it is done as the refusals say."""
    mesh, rank = mesh_of(), group.rank
    *whole, dout = rand(4, 2, length, 4, 3, seed=length)
    given = [distribute_tensor(x, mesh, [placement]).requires_grad_() for x in whole]
    attend = seqpar.UlyssesAttention(group, mask=Mask(causal=True))
    bad = seqpar.contiguous(length, SIZE)
    rows, layout = advised(lambda: attend(*given, bad))
    names = {"seqpar": seqpar, "Shard": Shard}
    layout = eval(layout, names)
    q, k, v = (eval(rows, {**names, "q": x}) for x in given)
    local = attend(q, k, v, layout)
    out = DTensor.from_local(local, mesh, [Shard(1)], run_check=False, shape=whole[0].shape,
                             stride=whole[0].stride())  # fmt: skip
    out.backward(distribute_tensor(dout, mesh, [Shard(1)]))
    whole = [x.requires_grad_() for x in whole]
    want = oracle.attention(*whole, oracle.visible(length, True, None), oracle.Terms(3**-0.5))
    grads = torch.autograd.grad(want, whole, dout)
    assert torch.equal(layout.positions(rank), mine(length, rank))
    got = out.full_tensor(), *(x.grad.full_tensor() for x in given)
    return [float((x - y).abs().sum()) for x, y in zip(got, (want, *grads), strict=True)]


def mine(length, rank):
    """The rows of a rank as torch.chunk has them."""
    chunks = torch.arange(length).chunk(SIZE)
    return chunks[rank] if rank < len(chunks) else torch.arange(0)


@pytest.mark.parametrize("length", [1, 3, 5, 10, 12])
@pytest.mark.parametrize("placement", [Shard(1), Replicate(), Shard(2)])
def test_what_a_refusal_advises_equals_one_device(four_processes, length, placement):
    """Lengths that do not divide are cut as torch.chunk does; ranks may hold nothing."""
    for differences in four_processes.run(by_advice, length, placement):
        assert max(differences) < 1e-11


def cut_anew(group, dim):
    """The rows of a DTensor in another layout, and the gradient of the sum of all ranks' rows."""
    mesh = mesh_of()
    x = rand(3, 10, 2) if dim == 1 else rand(10, 3, 2)
    given = distribute_tensor(x, mesh, [Shard(dim)]).requires_grad_()
    layout = seqpar.zigzag(10, SIZE)
    text = told(lambda: seqpar.shard_sequence(given, layout, group.rank, dim))
    code = re.search(r"give (\S+\]\));", text)
    assert code, text
    assert f"seqpar.contiguous(10, {SIZE}, multiple_of=3)" in text
    plain = eval(code[1], {"x": given, "Partial": Partial})
    rows = seqpar.shard_sequence(plain, layout, group.rank, dim)
    (rows * (1 + group.rank)).sum().backward()
    want = torch.empty_like(x)
    for rank in range(SIZE):
        want.index_fill_(dim, layout.positions(rank), 1.0 + rank)
    expected = x.index_select(dim, layout.positions(group.rank))
    return torch.equal(rows, expected), torch.equal(given.grad.full_tensor(), want)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_dtensor_is_cut_anew_as_its_refusal_says(four_processes, dim):
    assert four_processes.run(cut_anew, dim) == [(True, True)] * SIZE


def over_two_dimensions(group):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    given = distribute_tensor(rand(2, 12, 2, 4), mesh, [Shard(0), Shard(1)])
    return told(lambda: seqpar.RingAttention(group)(given, given, given, seqpar.zigzag(12, 4)))


def test_a_dtensor_of_two_dimensions_is_refused_too(four_processes):
    check_told(
        four_processes.run(over_two_dimensions), r"q.to_local\(\), once only the sequence is cut"
    )
