"""A step is a block of backwards: gradients of one device after it, and an error of one rank on every rank.

A failure here trains on gradients of one rank's tokens, or of P times as many, or leaves ranks waiting.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_steps import Model, Ranks, in_a_block, one_device, weight_of

import seqpar
from seqpar import DesyncError, simulate
from seqpar.testing.refusals import check_told, told

EXACT = {"rtol": 1e-11, "atol": 1e-11}


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
