"""Messages in the order in which strategies send them all end where nothing is buffered, as on NCCL."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import DesyncError, simulate
from seqpar.calls import Shape, dry_run, resolve
from seqpar.calls.dry_run import AllReduce, Exchange, Wait
from seqpar.comm import silent
from seqpar.strategies import STRATEGIES
from seqpar.testing.drawn import ALL_TERMS, cases, examples
from seqpar.testing.rendezvous import stuck


def all_steps(case, size, strategy, chunks, learns, *, invariant):
    """The forward and backward steps of every rank, or `None` where bits cannot be invariant."""
    plan = case.plan(silent(0, size), strategy, "reference")
    if STRATEGIES[strategy].exchanges_heads:
        plan = replace(plan, head_chunks=chunks)
    q, k, v, _ = case.tensors()
    try:
        plan = resolve(replace(plan, invariant=invariant), q, v)
    except (ValueError, NotImplementedError):
        return None
    learns = tuple(name for name in plan.score.tensors if learns)
    shape = Shape.of(q, k, v, learns=learns)
    steps = (dry_run.steps(plan, shape, rank) for rank in range(size))
    return [(*both.forward, *both.backward) for both in steps]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    case=cases(terms=ALL_TERMS, lengths=st.integers(0, 60)), size=st.integers(2, 8),
    chunks=st.integers(1, 3), learns=st.booleans(), invariant=st.booleans(),
)  # fmt: skip
@settings(max_examples=examples(0.5))
def test_no_order_of_messages_is_a_deadlock(strategy, case, size, chunks, learns, invariant):
    steps = all_steps(case, size, strategy, chunks, learns, invariant=invariant)
    if steps is None:
        return
    assert stuck(steps, in_order=True) is None
    assert stuck(steps, in_order=False) is None


def circle(size):
    """Every rank sends to the next in one batch and receives in another, both begun before either ends."""
    return [
        (
            Exchange(0, "planted", (((r + 1) % size, 8),), ()),
            Exchange(1, "planted", (), (((r - 1) % size, 8),)),
            Wait(0),
            Wait(1),
        )
        for r in range(size)
    ]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_circle_of_sends_is_found(size):
    assert stuck(circle(size), in_order=False) is None, "where both are under way it ends"
    found = stuck(circle(size), in_order=True)
    assert found is not None
    assert "rank 0 waits in batch 0 for messages of ranks 0 to 1" in found


def test_a_receive_that_comes_after_what_it_is_waited_in_is_found():
    first = (
        Exchange(0, "planted", ((1, 8),), ()),
        Wait(0),
        Exchange(1, "planted", ((1, 4),), ()),
        Wait(1),
    )
    other = (
        Exchange(0, "planted", (), ((0, 8),)),
        AllReduce(4),
        Wait(0),
        Exchange(1, "", (), ((0, 4),)),
        Wait(1),
    )
    assert "rank 1 is at AllReduce" in stuck([first, other], in_order=False)
    first = (*first, AllReduce(8))
    other = (*(step for step in other if not isinstance(step, AllReduce)), AllReduce(4))
    assert "num_bytes=8" in stuck([first, other], in_order=True), "ranks reduce other things"


def test_messages_that_do_not_fit_are_found():
    first = (Exchange(0, "planted", ((1, 8), (1, 4)), ()), Wait(0))
    other = (Exchange(0, "planted", (), ((0, 4), (0, 8))), Wait(0))
    assert (
        stuck([first, other], in_order=True)
        == "rank 0 sends [8, 4] bytes to rank 1, which receives [4, 8]"
    )
    assert "rank 1 waits" in stuck(
        [first, (*other, Exchange(1, "", (), ((0, 1),)), Wait(1))], in_order=True
    )


def test_what_is_never_waited_for_is_found():
    first = (Exchange(0, "planted", ((1, 8),), ()), Wait(0))
    other = (Exchange(0, "planted", (), ((0, 8),)),)
    assert stuck([first, other], in_order=False) == "rank 1 never waits for batches 0"


def sends_and_forgets(group):
    peer, x = 1 - group.rank, torch.ones(2)
    if group.rank == 0:
        group.exchange("forgotten", [(peer, x)], [])
    else:
        group.exchange("forgotten", [], [(peer, x)]).wait()


def test_what_is_begun_and_never_waited_for_is_an_error():
    with pytest.raises(
        DesyncError, match="rank 0 never waited for messages that it began: forgotten"
    ):
        simulate(2, sends_and_forgets)
