"""Schedules are made once for calls of one kind, and host work grows no faster than the number of ranks."""

import copy
import gc
import pickle
import sys
import threading
import weakref
from dataclasses import fields, replace

import pytest
import torch
from torch.autograd import forward_ad

from seqpar import (
    Dropout,
    Group,
    Mask,
    RingAttention,
    Score,
    UlyssesAttention,
    shard_sequence,
    simulate,
    striped,
    zigzag,
)
from seqpar.calls import check
from seqpar.comm import group as group_module
from seqpar.comm import silent
from seqpar.functional import attention, attention_with_lse
from seqpar.strategies import STRATEGIES, Plan, allgather, exchanges, mesh, plan, ring

ROUTES = ["ring", "allgather", "ulysses", "mesh", "hybrid"]


def planned(group, strategy, layout, mask):
    """A plan made anew, of objects made anew."""
    grid = group.grid(ulysses=2) if STRATEGIES[strategy].needs_grid else None
    return Plan(group, layout(16 * group.size, group.size), mask, strategy=strategy, grid=grid)


def step(group, strategy, layout=zigzag, mask=None, **how):
    made = planned(group, strategy, layout, mask or Mask(causal=True, **how))
    q, k, v = (torch.zeros(1, 16, 4, 8, requires_grad=True) for _ in range(3))
    attention(q, k, v, made).sum().backward()


@pytest.mark.parametrize("strategy", ROUTES)
def test_a_second_call_of_a_kind_makes_nothing_anew(strategy, monkeypatch):
    made, together = [], threading.Barrier(4)

    def counted(name, real):
        def counting(*args, **kwargs):
            made.append(name)
            return real(*args, **kwargs)

        counting.__name__ = name
        return counting

    for module, name in (
        (ring, "meets"), (mesh, "meets"), (allgather, "meets"), (exchanges, "split_heads"),
        (plan, "tiles"), (plan, "tall_tiles"), (check, "choose"), (check, "invariant_implementation"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))

    def fn(group):
        seen = []
        for how in ({}, {}, {"window": 5}, {"layout": striped}, {}):
            together.wait()
            before = len(made)
            together.wait()
            step(group, strategy, **how)
            together.wait()
            seen.append(made[before:])
        return seen

    for first, again, window, layout, back in simulate(4, fn):
        assert first
        assert again == []
        assert window
        assert layout
        assert back == []


def calls(size, strategy, monkeypatch):
    """The number of Python and C functions that a warm step calls on one of so many ranks."""
    group = silent(size // 2, size)
    monkeypatch.setattr(Plan, "blocks", lambda *_: iter(()))
    for _ in range(2):
        step(group, strategy)
    counted = []
    sys.setprofile(lambda frame, event, _: counted.append(event) if "call" in event else None)
    try:
        step(group, strategy)
    finally:
        sys.setprofile(None)
    return len(counted)


@pytest.mark.parametrize("strategy", ROUTES)
def test_host_work_grows_no_faster_than_ranks(strategy, monkeypatch):
    few, many = (calls(size, strategy, monkeypatch) for size in (64, 256))
    assert many < 5 * few


def test_a_grid_of_another_group_sends_in_that_group():
    """Ranks and members are the same, and the call's schedules are another one's."""

    def fn(group):
        sent = []
        for _ in range(2):
            other = Group(group.transport)
            grid = other.grid(ulysses=2)
            q, k, v = (torch.zeros(1, 16, 4, 8) for _ in range(3))
            for strategy in ("hybrid", "mesh"):
                attention(q, k, v, Plan(group, zigzag(64, 4), strategy=strategy, grid=grid))
                sent.append(other.traffic.total.bytes)
        return sent

    for sent in simulate(4, fn):
        assert 0 < sent[0] < sent[1]
        assert sent[:2] == sent[2:]


def test_thousands_of_tiles_are_not_kept():
    group = Group.alone()
    layout = striped(4096, 2, multiple_of=8)
    made = Plan(group, layout, Mask(causal=True))
    score = Score().resolve(8)
    spans = layout.spans
    for dropout in (None, Dropout(0.1, 1)):
        of = replace(made, dropout=dropout)
        assert list(of.blocks(spans[0], spans[1], of.mask, score, 0, 0))
        assert list(of.blocks(spans[0][:4], spans[1][:4], of.mask, score, 0, 0))
    for name in ("tiles", "tall_tiles"):
        known = made.kept(name, dict)
        assert [key for key in known if len(key[0]) > 4] == []
        assert len(known) == 1


def test_a_group_ends_with_its_last_reference():
    """What it keeps does not refer to it: gloo's threads would live on."""
    gone = []

    def fn(group):
        other = Group(group.transport)
        layout = zigzag(64, 4)
        for strategy in ("allgather", "ulysses", "ring"):
            q, k, v = (torch.zeros(1, 16, 4, 8) for _ in range(3))
            attention(q, k, v, Plan(other, layout, Mask(causal=True), strategy=strategy))
        name = other.name
        del other
        gone.append(name)

    gc.disable()
    try:
        simulate(4, fn)
        assert [name for name in gone if name in group_module._LIVE] == []
    finally:
        gc.enable()


def test_what_plan_and_shapes_decide_is_decided_once(monkeypatch):
    decided, real = [], check._checked

    def counted(q, *rest, **how):
        decided.append(tuple(q.shape))
        return real(q, *rest, **how)

    monkeypatch.setattr(check, "_checked", counted)
    made = Plan(Group.alone(), zigzag(16, 1), Mask(causal=True))

    def decisions(batch=1, dtype=torch.float32, attend=attention):
        before = len(decided)
        attend(*(torch.zeros(batch, 16, 4, 8, dtype=dtype) for _ in range(3)), made)
        return len(decided) - before

    assert decisions() == 1
    assert decisions() == 0
    assert decisions(batch=2) == 1
    assert decisions(dtype=torch.bfloat16) == 1
    assert decisions(attend=attention_with_lse) == 1
    torch.use_deterministic_algorithms(True)
    try:
        assert decisions() == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert decisions() == decisions(batch=2) == decisions(attend=attention_with_lse) == 0


def test_what_may_be_another_in_every_call_is_looked_at_in_every_call():
    layout, sinks = zigzag(16, 1), torch.zeros(4)
    made = Plan(Group.alone(), layout, Mask(causal=True), Score(sinks=sinks))
    q, k, v = (torch.randn(1, 16, 4, 8) for _ in range(3))
    first = attention(q, k, v, made)
    sinks += 3
    again = Plan(made.group, layout, made.mask, Score(sinks=sinks.clone()))
    assert torch.equal(attention(q, k, v, made), attention(q, k, v, again))
    assert not torch.equal(attention(q, k, v, made), first)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="q carries a tangent"):
            attention(dual, k, v, made)
    sinks.data = torch.full(
        (4,), 7.0
    )  # as `module.to` does: a view of before would show the old ones
    again = replace(again, score=Score(sinks=sinks.clone()))
    assert torch.equal(attention(q, k, v, made), attention(q, k, v, again))
    sinks.data = torch.zeros(5)
    with pytest.raises(ValueError, match="sinks must have one entry for each of the 4 query heads"):
        attention(q, k, v, made)


def test_a_shard_of_another_layout_is_refused_in_a_later_call():
    def fn(group):
        plan = Plan(group, zigzag(16, 2), Mask(causal=True))
        whole = torch.randn(1, 16, 4, 8)
        right, wrong = (
            shard_sequence(whole, deal(16, 2), group.rank) for deal in (zigzag, striped)
        )
        attention(right, right, right, plan)
        attention(wrong, right, right, plan)

    with pytest.raises(ValueError, match="q was cut as"):
        simulate(2, fn)


def test_a_module_gives_its_plan_again_while_nothing_differs():
    module = RingAttention(Group.alone(), mask=Mask(causal=True), dropout=Dropout(0.5, 3))
    kept = module.plan(zigzag(16, 1))
    assert module.plan(zigzag(16, 1)) is kept
    for change in (
        lambda: module.eval(), lambda: module.train(), lambda: setattr(module, "mask", Mask()),
        lambda: setattr(module, "dropout", Dropout(0.5, 4)), lambda: setattr(module, "agree", "plan"),
        lambda: setattr(module, "score", Score(softcap=3.0)),
    ):  # fmt: skip
        change()
        changed = module.plan(zigzag(16, 1))
        assert changed is not kept
        assert (changed.mask, changed.score, changed.agree) == (
            module.mask,
            module.score,
            module.agree,
        )
        assert changed.dropout == (module.dropout if module.training else None)
        assert module.plan(zigzag(16, 1)) is changed
        kept = changed
    assert module.plan(zigzag(17, 1)).layout.length == 17
    assert module.plan(zigzag(17, 1), zigzag(9, 1)).keys.length == 9
    module(*(torch.zeros(1, 17, 2, 8) for _ in range(3)), zigzag(17, 1))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        theirs, ours = (x.plan(zigzag(17, 1)) for x in (copied, module))
        assert theirs is not ours
        assert theirs.is_as(replace(ours, group=copied.group, score=copied.score))


def test_a_module_keeps_no_tensors_of_a_score():
    module = RingAttention(Group.alone())
    module.score = Score(sinks=torch.zeros(2, requires_grad=True) * 2)
    module(*(torch.zeros(1, 16, 2, 8) for _ in range(3)), zigzag(16, 1))
    graph = weakref.ref(module.score.sinks)
    module.score = Score()
    gc.collect()
    assert graph() is None


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("mask", Mask(), torch.ones(2, 2)), ("mask", torch.ones(2, 2), torch.ones(2, 2)),
        ("invariant", False, 0), ("head_chunks", 1, 1.0),
    ],
)  # fmt: skip
def test_what_nobody_has_checked_is_not_compared(name, good, bad):
    """It would raise on one rank, where the call refuses on all, or let through what is refused."""
    module = UlyssesAttention(Group.alone())
    setattr(module, name, good)
    first = module.plan(zigzag(16, 1))
    setattr(module, name, bad)
    assert getattr(module.plan(zigzag(16, 1)), name) is bad
    assert first is not module.plan(zigzag(16, 1))
    with pytest.raises((TypeError, ValueError)):
        module(*(torch.zeros(1, 16, 2, 8) for _ in range(3)), zigzag(16, 1))


def test_threads_that_share_a_module_get_their_own_plans():
    module, wrong = RingAttention(Group.alone()), []

    def run(length):
        for _ in range(3000):
            wrong.extend([length] * (module.plan(layouts[length]).layout.length != length))

    layouts = {length: zigzag(length, 1) for length in (16, 24)}
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(length,)) for length in layouts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []


def test_what_a_plan_decided_is_not_pickled():
    plan = Plan(Group.alone(), zigzag(16, 1), Mask(causal=True))
    attention(*(torch.zeros(1, 16, 2, 8) for _ in range(3)), plan)
    copied = pickle.loads(pickle.dumps(plan))
    assert set(vars(copied)) == {field.name for field in fields(Plan)}
    assert copied.is_as(replace(plan, group=copied.group, score=copied.score))
    old = RingAttention(Group.alone())
    vars(old).pop("_last", None)  # as one that was pickled by an earlier version
    assert old.plan(zigzag(16, 1)).layout == zigzag(16, 1)
