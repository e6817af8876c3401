"""Losses over data-parallel replicas and micro-batches: the mean over all tokens of a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import seqpar
from seqpar import DesyncError, simulate

EXACT = {"rtol": 1e-12, "atol": 1e-14}
IGNORE = -100


def micro_batches(num, length, kept):
    """Whole batches `[2 s]` with labels, of which about a share `kept` count."""
    generator = torch.Generator().manual_seed(num + 31 * length)
    for _ in range(num):
        ids = torch.randint(9, (2, length), generator=generator)
        counts = torch.rand(ids.shape, generator=generator) < kept
        yield {"input_ids": ids, "labels": ids.masked_fill(~counts, IGNORE)}


def token_losses(weight, batch):
    logits, labels = weight[batch["input_ids"]].flatten(0, 1), batch["labels"].flatten()
    return torch.nn.functional.cross_entropy(
        logits, labels, reduction="none", ignore_index=IGNORE
    ), labels != IGNORE


def one_device(batches):
    """The loss and gradient of torch's own mean over all tokens at once."""
    weight = torch.linspace(-1, 1, 81, dtype=torch.float64).view(9, 9).requires_grad_()
    losses = []
    for batch in batches:
        labels = torch.cat([batch["labels"][:, 1:], torch.full((2, 1), IGNORE)], 1)
        all_losses, counts = token_losses(weight, batch | {"labels": labels})
        losses.append(all_losses[counts])
    losses = torch.cat(losses)
    loss = losses.sum() / max(1, losses.numel())
    loss.backward()
    return loss.detach(), weight.grad


def step(group, replicas, num, length, kept, gradients):
    """A training step of `replicas`, each with `num` micro-batches; every rank's loss and gradient."""
    weight = torch.linspace(-1, 1, 81, dtype=torch.float64).view(9, 9).requires_grad_()
    grid = group.grid(ring=replicas)
    replica = grid.index_of(group.rank)[0]
    batches = list(micro_batches(num * replicas, length, kept))[replica::replicas]
    shards = [seqpar.shard_batch(batch, grid.ulysses)[0] for batch in batches]
    total = seqpar.count_tokens([shard["labels"] != IGNORE for shard in shards], group)
    loss = torch.zeros((), dtype=torch.float64)
    for shard in shards:
        losses, counts = token_losses(weight, shard)
        part = seqpar.mean_loss(losses, group, valid=counts, num_tokens=total, gradients=gradients)
        part.backward()
        loss += part.detach()
    seqpar.sum_gradients([weight], group)
    return loss, weight.grad / (group.size if gradients == "mean" else 1)


@given(
    st.sampled_from([(1, 3), (2, 1), (2, 2), (3, 2), (2, 3)]),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(["sum", "mean"]),
)
def test_replicas_and_micro_batches_have_the_loss_and_gradient_of_one_device(
    world, num, length, kept, gradients
):
    """Ranks, replicas and micro-batches without a valid token included."""
    replicas, sharers = world
    loss, grad = one_device(micro_batches(num * replicas, length, kept))
    for got in simulate(replicas * sharers, step, replicas, num, length, kept, gradients):
        torch.testing.assert_close(got, (loss, grad), **EXACT)


def test_replicas_over_processes(worlds):
    loss, grad = one_device(micro_batches(4, 7, 0.5))
    for got in worlds.run(4, step, 2, 2, 7, 0.5, "mean"):
        torch.testing.assert_close(got, (loss, grad), **EXACT)


def test_gradients_to_be_averaged_do_not_change_the_loss():
    def fn(group):
        x = torch.tensor([1.0, 2.0 + group.rank], requires_grad=True)
        loss = seqpar.mean_loss(x, group, gradients="mean")
        loss.backward()
        return loss.item(), x.grad.tolist()

    assert simulate(2, fn) == [(1.75, [0.5, 0.5])] * 2


def test_tokens_are_counted_over_ranks_and_micro_batches():
    def fn(group):
        masks = [torch.arange(4) <= group.rank, torch.zeros(0, dtype=torch.bool)]
        count = seqpar.count_tokens(iter(masks), group)
        return count.dtype, count.item(), seqpar.count_tokens(masks[0], group).item()

    assert simulate(3, fn) == [(torch.int64, 6, 6)] * 3


def test_what_one_rank_counts_wrongly_every_rank_refuses():
    def raises(error, match, fn):
        with pytest.raises(error, match=match):
            simulate(2, fn)

    ones = torch.ones(3)
    raises(TypeError, "valid must be bool", lambda g: seqpar.count_tokens([ones], g))
    raises(ValueError, "at least one", lambda g: seqpar.count_tokens([], g))
    masks = [ones.bool()] * 2
    raises(DesyncError, "micro-batches", lambda g: seqpar.count_tokens(masks[g.rank :], g))
    raises(ValueError, "one number", lambda g: seqpar.mean_loss(ones, g, num_tokens=ones))
    raises(ValueError, "negative", lambda g: seqpar.mean_loss(ones, g, num_tokens=-1))
    raises(DesyncError, "num_tokens", lambda g: seqpar.mean_loss(ones, g, num_tokens=1 + g.rank))
    raises(ValueError, "one of", lambda g: seqpar.mean_loss(ones, g, gradients="average"))
    kinds = "sum", "mean"
    raises(DesyncError, "gradients", lambda g: seqpar.mean_loss(ones, g, gradients=kinds[g.rank]))


def test_a_scalar_is_no_loss_of_each_token():
    with pytest.raises(ValueError, match="the loss of each token, got one number"):
        seqpar.mean_loss(torch.tensor(1.0), seqpar.Group.alone())


def test_gradients_are_summed_once_and_of_parameters_that_are_there():
    """Twice would be P times too much, and an iterator that is used up would be none at all."""

    def fn(group):
        model = torch.nn.Linear(2, 2)
        torch.nn.init.eye_(model.weight)
        torch.nn.init.zeros_(model.bias)
        parameters = model.parameters()
        assert len(list(parameters)) == 2
        with pytest.raises(ValueError, match="used up by its first use"):
            seqpar.sum_gradients(parameters, group)
        for step in range(2):
            model(torch.ones(1, 2)).sum().backward()
            seqpar.sum_gradients(model.parameters(), group)
            with pytest.raises(ValueError, match="as sum_gradients left them"):
                seqpar.sum_gradients(model.parameters(), group)
            model.zero_grad(set_to_none=step == 0)
        return model.weight.grad

    assert all(torch.equal(grad, torch.zeros(2, 2)) for grad in simulate(2, fn))


def test_what_ranks_do_not_hold_alike_is_not_summed():
    """Experts look like copies of each other; only at the first sum are weights compared."""

    def fn(group):
        shared, expert = torch.ones(3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
        with torch.no_grad():
            expert[1] += 1e-7 * group.rank
        (shared.sum() + expert.sum()).backward()
        with pytest.raises(DesyncError, match=r"the copy of parameter 1 \(2, 3\) is"):
            seqpar.sum_gradients([shared, expert], group)
        assert torch.equal(expert.grad, torch.ones(2, 3)), "nothing was summed"
        seqpar.sum_gradients([shared], group)
        seqpar.sum_gradients([expert], seqpar.Group.alone())
        with torch.no_grad():  # as steps of the ranks might round
            shared += 1e-7 * group.rank
        shared.grad = torch.ones(3)
        seqpar.sum_gradients([shared], group)
        return shared.grad

    assert all(torch.equal(grad, torch.full((3,), 2.0)) for grad in simulate(2, fn))
