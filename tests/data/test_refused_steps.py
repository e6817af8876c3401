"""What is no step whose gradients are to be summed is refused on every rank, and the next step is right."""

import pytest
import torch
from small_steps import Model, weight_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import seqpar
from seqpar import simulate
from seqpar.testing.refusals import check_told, told


def twice(group):
    p = weight_of()
    for _ in range(2):
        seqpar.backward(p.sum(), [p], group)


def twice_and_clipped(group):
    p = weight_of()
    for _ in range(2):
        seqpar.backward(p.sum(), [p], group)
        nn.utils.clip_grad_norm_([p], 0.1)


def unfrozen_and_not_alike(group):
    shared, other = weight_of(), nn.Parameter(torch.full((2,), 1.0 + group.rank), False)
    with seqpar.summed_gradients(nn.ParameterList([shared, other]), group):
        other.requires_grad_()
        (shared * other).sum().backward()


def logprobs_for_wrappers(group):
    logits = nn.Parameter(torch.ones(1, 1, 5))
    labels, layout = torch.zeros(1, 1, dtype=torch.long), seqpar.contiguous(group.size, group.size)
    with seqpar.summed_gradients([logits], group):
        seqpar.token_logprobs(logits, labels, layout, group, gradients="mean").sum().backward()


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


class DeepSpeedEngine(Wrapped):
    pass


def wrapped(group, kind=Own):
    model = nn.Linear(2, 2)
    seqpar.backward(model(torch.ones(1, 2)).sum(), kind(model), group)


def in_an_engine(group):
    wrapped(group, DeepSpeedEngine)


REFUSED = {
    twice_and_clipped: "ValueError: gradients of an earlier step are there",
    unfrozen_and_not_alike: r"DesyncError: .*the copy of parameter 0",
    logprobs_for_wrappers: "ValueError: gradients='mean' is for wrappers .* 4 times too large",
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
    in_an_engine: "NotImplementedError: DeepSpeedEngine reduces gradients itself",
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
