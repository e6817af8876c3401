"""Schedules are made once for calls of one kind, and host work grows no faster than the number of ranks."""

import gc
import sys
import threading
from dataclasses import replace

import pytest
import torch

from seqpar import Dropout, Group, Mask, Score, simulate, striped, zigzag
from seqpar.calls import check
from seqpar.comm import group as group_module
from seqpar.comm import silent
from seqpar.functional import attention
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
        assert list(of.blocks(spans[0], spans[1], score, 0))
        assert list(of.blocks(spans[0][:4], spans[1][:4], score, 0))
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
