"""A step is a block of backwards: gradients of one device after it, and an error of one rank on every rank.

A failure here trains on gradients of one rank's tokens, or of P times as many, or leaves ranks waiting.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import seqpar
from seqpar import DesyncError, Mask, simulate
from seqpar.testing.refusals import check_told, told

EXACT = {"rtol": 1e-11, "atol": 1e-11}
IGNORE = -100


class Model(nn.Module):
    """An embedding, causal attention by whoever is given it, and a head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.qkv, self.head = nn.Embedding(9, 6), nn.Linear(6, 18), nn.Linear(6, 9)
        self.double()
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, ids, attend):
        x = self.embedding(ids)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 3)).unbind(2)
        return self.head(x + attend(q, k, v).flatten(2))


def dense(*qkv):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def micro_batches(num, length):
    """Whole batches `[2 s]` with labels, the first of which counts no token at all."""
    generator = torch.Generator().manual_seed(num + 31 * length)
    for n in range(num):
        ids = torch.randint(9, (2, length), generator=generator)
        counts = torch.rand(ids.shape, generator=generator) < (0.7 if n else 0.0)
        yield {"input_ids": ids, "labels": ids.masked_fill(~counts, IGNORE)}


def token_losses(model, ids, labels, attend):
    logits = model(ids, attend)
    return nn.functional.cross_entropy(
        logits.mT, labels, ignore_index=IGNORE, reduction="none"
    ), labels != IGNORE


def one_device(num, length):
    """The gradients of the mean over all tokens at once."""
    model, losses = Model(), []
    for batch in micro_batches(num, length):
        labels = torch.cat([batch["labels"][:, 1:], torch.full((2, 1), IGNORE)], 1)
        found, counts = token_losses(model, batch["input_ids"], labels, dense)
        losses.append(found.masked_fill(~counts, 0).sum())
        losses.append(found.sum() * 0)
    count = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in micro_batches(num, length))
    (sum(losses) / max(1, count)).backward()
    return [p.grad for p in model.parameters()]


class Ranks:
    """The ranks of one replica among those of all, and what they hold of its micro-batches."""

    def __init__(self, group, replicas, num, length):
        grid = group.grid(ring=replicas)
        self.everyone, self.sharers = group, group if replicas == 1 else grid.ulysses
        replica = grid.index_of(group.rank)[0]
        mine = list(micro_batches(num * replicas, length))[replica::replicas]
        self.shards = [seqpar.shard_batch(batch, self.sharers) for batch in mine]
        self.attend = seqpar.RingAttention(self.sharers, mask=Mask(causal=True))
        valid = [shard["labels"] != IGNORE for shard, _ in self.shards]
        self.total = seqpar.count_tokens(valid, group)

    def loss(self, model, n=0):
        shard, layout = self.shards[n]
        losses, counts = token_losses(
            model, shard["input_ids"], shard["labels"], lambda *qkv: self.attend(*qkv, layout)
        )
        return seqpar.mean_loss(losses, self.everyone, valid=counts, num_tokens=self.total)


def in_a_block(group, replicas, num, length, of):
    ranks, model = Ranks(group, replicas, num, length), Model()
    given = model if of == "model" else model.parameters()
    for _ in range(2):  # a second step begins anew
        model.zero_grad()
        with seqpar.summed_gradients(given, group, axes=(ranks.sharers,)):
            for n in range(num):
                ranks.loss(model, n).backward()
        given = model if of == "model" else model.parameters()
    return [p.grad for p in model.parameters()]


def at_once(group, replicas, length):
    ranks, model = Ranks(group, replicas, 1, length), Model()
    seqpar.backward(ranks.loss(model), model, group, axes=(ranks.sharers,))
    return [p.grad for p in model.parameters()]


WORLDS = st.sampled_from([(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (2, 3)])


@given(WORLDS, st.integers(1, 3), st.integers(1, 9), st.sampled_from(["model", "parameters"]))
def test_a_block_of_backwards_gives_the_gradients_of_one_device(world, num, length, of):
    """Ranks without a token, and micro-batches without a valid one, included."""
    replicas, sharers = world
    want = one_device(num * replicas, length)
    for got in simulate(replicas * sharers, in_a_block, replicas, num, length, of):
        torch.testing.assert_close(got, want, **EXACT)


@given(WORLDS, st.integers(1, 9))
def test_one_backward_and_the_sum_give_the_gradients_of_one_device(world, length):
    replicas, sharers = world
    want = one_device(replicas, length)
    for got in simulate(replicas * sharers, at_once, replicas, length):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize(("replicas", "size"), [(1, 3), (2, 4)])
def test_a_block_over_processes_gives_the_gradients_of_one_device(worlds, replicas, size):
    want = one_device(2 * replicas, 7)
    for got in worlds.run(size, in_a_block, replicas, 2, 7, "model"):
        torch.testing.assert_close(got, want, **EXACT)
    want = one_device(replicas, 7)
    for got in worlds.run(size, at_once, replicas, 7):
        torch.testing.assert_close(got, want, **EXACT)


PHASES = ["before", "in a call", "between", "in backward", "after"]


def fails(phase):
    raise OSError(f"no memory {phase}")


def with_an_error(group, replicas, phase, at_fault, axes):
    """What this rank is told where others raise, whether anything was summed, and the step after it."""
    ranks, model = Ranks(group, replicas, 2, 7), Model()
    mine = group.rank in at_fault

    def block():
        over = (ranks.sharers,) if axes else ()
        with seqpar.summed_gradients(model, group, axes=over):
            for n in range(2):
                if mine and n == 1 and phase == "before":
                    fails(phase)
                if mine and n == 1 and phase == "in a call":
                    ranks.attend(*[torch.ones(1, 99, 2, 3)] * 3, ranks.shards[0][1])
                loss = ranks.loss(model, n)
                if mine and n == 1 and phase == "between":
                    fails(phase)
                if mine and n == 1 and phase == "in backward":
                    loss.register_hook(lambda _: fails(phase))
                loss.backward()
            if mine and phase == "after":
                fails(phase)

    try:
        block()
    except (OSError, ValueError, DesyncError) as error:
        text = f"{type(error).__name__}: {error}"
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ranks.loss(model, 0).backward()
    own = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ranks.loss(model, 1).backward()
    both = [p.grad + x for p, x in zip(model.parameters(), own, strict=True)]
    # Where backward ended early, some parameters have what the second one adds.
    is_own = all(
        any(torch.allclose(x, y, rtol=1e-12, atol=1e-12) for y in either)
        for x, *either in zip(grads, own, both, strict=True)
    )
    return text, is_own, in_a_block(group, replicas, 2, 7, "model")


def check_error(results, phase, at_fault, replicas):
    want = one_device(2 * replicas, 7)
    said = "must hold . of the 7 positions" if phase == "in a call" else f"no memory {phase}"
    for rank, (text, is_own, grads) in enumerate(results):
        own = "ValueError" if phase == "in a call" else "OSError"
        assert text.startswith(own if rank in at_fault else "DesyncError"), text
        check_told([text], said)
        assert is_own, "nothing is summed"
        torch.testing.assert_close(grads, want, **EXACT)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("at_fault", [(1,), (0, 2), (0, 1, 2)])
def test_an_error_of_some_ranks_is_one_of_all_and_nothing_is_summed(phase, at_fault):
    check_error(simulate(3, with_an_error, 1, phase, at_fault, False), phase, at_fault, 1)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("at_fault", [(1,), (0, 3), (2, 3)])
def test_an_error_of_some_ranks_is_heard_by_all_replicas(phase, at_fault):
    """Also where its sharers are in the middle of a call, and those of the other replica at the end."""
    check_error(simulate(4, with_an_error, 2, phase, at_fault, True), phase, at_fault, 2)


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_of_one_process_is_one_of_all(worlds, phase):
    results = worlds.run(4, with_an_error, 2, phase, (1,), True, timeout=30)
    check_error(results, phase, (1,), 2)


def test_a_refusal_of_a_replica_needs_no_axes():
    """All ranks of that replica have left the block; those of the other one hear it at its end."""
    check_error(simulate(4, with_an_error, 2, "in a call", (1,), False), "in a call", (1,), 2)


def weight_of(length=2):
    return nn.Parameter(torch.ones(length))


def twice(group):
    p = weight_of()
    for _ in range(2):
        seqpar.backward(p.sum(), [p], group)


def summed_inside(group):
    p = weight_of()
    with seqpar.summed_gradients([p], group):
        p.sum().backward()
        seqpar.sum_gradients([p], group)


def for_wrappers(group):
    p = weight_of()
    with seqpar.summed_gradients([p], group):
        seqpar.mean_loss(p, group, gradients="mean").backward()


def for_wrappers_before(group):
    p = weight_of()
    seqpar.backward(seqpar.mean_loss(p, group, gradients="mean"), [p], group)


def of_fewer(group):
    p = weight_of()
    with seqpar.summed_gradients([p], group):
        seqpar.mean_loss(p, group.grid(ulysses=2).ulysses).backward()


def of_fewer_before(group):
    p = weight_of()
    seqpar.backward(seqpar.mean_loss(p, group.grid(ulysses=2).ulysses), [p], group)


def used_up(group):
    parameters = Model().parameters()
    assert list(parameters)
    with seqpar.summed_gradients(parameters, group):
        pass


def others(group):
    with seqpar.summed_gradients([weight_of(1 + group.rank)], group):
        pass


def sparse(group):
    table = nn.Embedding(3, 2, sparse=True)
    seqpar.backward(table(torch.tensor([0])).sum(), table, group)


def with_a_graph(group):
    p = weight_of()
    with seqpar.summed_gradients([p], group):
        p.square().sum().backward(create_graph=True)


def without_backward(group):
    with seqpar.summed_gradients([weight_of()], group):
        pass


class Wrapped(nn.Module):
    """By its name alone, which is what is looked for."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Own(type("DistributedDataParallel", (Wrapped,), {})):
    pass


def wrapped(group):
    model = nn.Linear(2, 2)
    seqpar.backward(model(torch.ones(1, 2)).sum(), Own(model), group)


REFUSED = {
    twice: "ValueError: gradients of an earlier step are there .* all micro-batches of a step in one",
    summed_inside: "ValueError: gradients are as sum_gradients left them",
    for_wrappers: "ValueError: gradients='mean' is for wrappers .* 4 times too large",
    for_wrappers_before: "ValueError: gradients='mean' is for wrappers .* 4 times too large",
    of_fewer: r"ValueError: the loss is the mean over the tokens of ranks \[., .\], .* over \[0, 1, 2, 3\]",
    of_fewer_before: r"ValueError: the loss is the mean over the tokens of ranks \[., .\], .* over \[0, 1,",
    used_up: "ValueError: no parameter wants a gradient; .* or give the model",
    others: r"DesyncError: .*parameters is \[\(\(1,\), torch.float32\)\] on rank 0",
    without_backward: "ValueError: no parameter has a gradient on any rank: go backward in the block",
    sparse: "NotImplementedError: sparse gradients",
    with_a_graph: "NotImplementedError: a sum in place has no derivative",
    wrapped: r"NotImplementedError: DistributedDataParallel reduces .*gradients='mean'\), call loss.backward",
}


def right(group):
    p = weight_of()
    seqpar.backward(seqpar.mean_loss(p, group), [p], group)
    return p.grad


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("wrong", REFUSED, ids=lambda f: f.__name__)
def test_what_all_ranks_do_wrong_in_a_step_all_refuse(wrong):
    def fn(group):
        return told(lambda: wrong(group)), right(group)

    for text, grad in simulate(4, fn):
        check_told([text], REFUSED[wrong])
        torch.testing.assert_close(grad, torch.full((2,), 0.5))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize(
    "wrong", [for_wrappers, used_up, sparse, with_a_graph, wrapped], ids=lambda f: f.__name__
)
def test_what_one_rank_does_wrong_in_a_step_all_refuse(wrong):
    def fn(group):
        return told(lambda: (wrong if group.rank == 1 else right)(group)), right(group)

    for rank, (text, grad) in enumerate(simulate(4, fn)):
        check_told([text], REFUSED[wrong])
        assert text.startswith("DesyncError") == (rank != 1)
        torch.testing.assert_close(grad, torch.full((2,), 0.5))


def test_a_loss_that_is_only_looked_at_may_be_the_mean_over_others():
    def fn(group):
        p, few = weight_of(), group.grid(ulysses=2).ulysses
        with seqpar.summed_gradients([p], group):
            seqpar.mean_loss(p, group).backward()
            seqpar.mean_loss(p.detach(), few)
            with torch.no_grad():
                seqpar.mean_loss(p, few, gradients="mean")
        seqpar.mean_loss(p, few, gradients="mean")  # and behind it anything
        return p.grad.tolist()

    assert simulate(4, fn) == [[0.5, 0.5]] * 4


def experts(group, at_fault=None):
    """Parameters that all ranks hold alike, and one that two of them do, whose loss is the mean over all."""
    pair, (shared, own) = group.grid(ulysses=2).ulysses, (weight_of(), weight_of())
    text = told(lambda: shared_step(group, pair, shared, own, at_fault))
    return text, shared.grad, own.grad


def shared_step(group, pair, shared, own, at_fault):
    with (
        seqpar.summed_gradients([shared], group, axes=(pair,)),
        seqpar.summed_gradients([own], pair, axes=(group,)),
    ):
        loss = seqpar.mean_loss((1.0 + group.rank) * shared * own, group)
        if group.rank == at_fault:
            fails("between")
        loss.backward()


def test_a_block_in_a_block_sums_over_fewer_ranks():
    for rank, (text, shared, own) in enumerate(simulate(4, experts)):
        assert text == "nothing"
        torch.testing.assert_close(shared, torch.full((2,), (1 + 2 + 3 + 4) / 8))
        torch.testing.assert_close(own, torch.full((2,), (1 + 2 if rank < 2 else 3 + 4) / 8))


@pytest.mark.parametrize("at_fault", range(4))
def test_an_error_in_blocks_in_blocks_is_one_of_all(at_fault):
    def fn(group):
        try:
            text = experts(group, at_fault)[0]
        except OSError as error:
            text = str(error)
        return text, experts(group)[0]

    for text, after in simulate(4, fn):
        check_told([text], "no memory between")
        assert after == "nothing"


def test_a_block_that_is_left_early_sums_what_there_is():
    def fn(group):
        p = weight_of()
        for _ in range(3):
            with seqpar.summed_gradients([p], group):
                p.sum().backward()
                break
        return p.grad.tolist()

    assert simulate(3, fn) == [[3.0, 3.0]] * 3


def by_wrappers(group):
    """What is told of real wrappers, and whether it is told before a backward."""
    ddp = DistributedDataParallel(nn.Linear(4, 4))
    found = []
    for model in (ddp, nn.Sequential(nn.Linear(4, 4), ddp)):
        loss = model(torch.ones(1, 4)).sum()
        found.append(told(lambda loss=loss, model=model: seqpar.backward(loss, model, group)))
        assert all(p.grad is None for p in model.parameters())
        found.append(told(lambda model=model: seqpar.sum_gradients(model, group)))
    return found


def test_models_in_ddp_are_refused_before_backward(four_processes):
    for found in four_processes.run(by_wrappers):
        assert len(found) == 4
        check_told(found, "NotImplementedError: DistributedDataParallel reduces gradients itself")


def by_fsdp(group):
    found = []
    for of in ("model", "parameters"):
        for first in ("the block", "forward"):
            model = nn.Linear(4, 4)
            fully_shard(model)

            def step(model=model, of=of, first=first):
                loss = model(torch.ones(1, 4)).sum() if first == "forward" else None
                given = model if of == "model" else model.parameters()
                with seqpar.summed_gradients(given, group):
                    loss = model(torch.ones(1, 4)).sum() if loss is None else loss
                    loss.backward()

            found.append((of, first, told(step)))
    return found


def test_models_in_fsdp_are_refused_also_where_they_show_whole_parameters(four_processes):
    """As they do between forward and backward, without gradients and without a word."""
    for found in four_processes.run(by_fsdp):
        for of, first, text in found:
            whole = (of, first) == ("parameters", "forward")
            check_told(
                [text], "give the model, not its param" if whole else r"sharded \(DTensor\) over"
            )


def over_the_other_ranks(group):
    """FSDP over two replicas, whose gradients still lack the sum over those that share a sequence."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    sharers, model = seqpar.Group.of(mesh["sp"]), nn.Linear(4, 3, bias=False).double()
    nn.init.ones_(model.weight)
    fully_shard(model, mesh=mesh["dp"])
    x = torch.arange(4, dtype=torch.float64) * (1 + group.rank)
    seqpar.backward(model(x).sum(), model, sharers)
    return model.weight.grad.full_tensor()


def test_shards_over_other_ranks_are_summed(four_processes):
    """FSDP has averaged over the two replicas; ranks 0 to 3 hold 1 to 4 times the tokens."""
    want = (torch.arange(4.0, dtype=torch.float64) * (1 + 2 + 3 + 4) / 2).expand(3, 4)
    for got in four_processes.run(over_the_other_ranks):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
