"""Models of many families on sharded sequences equal one device: logits, loss, every gradient."""

import os
from functools import cache

import pytest
import torch

import seqpar
from seqpar.testing.models.tiny import FAMILIES, SERVED, batch_of
from seqpar.testing.models.training_step import differences, on_rank, one_device

EXACT = {"logits": 1e-10, "loss": 1e-10, "gradients": 1e-10, "float32": 1e-6}
LENGTH = 37  # prime: no number of ranks divides it


def check(got, want, family, **options):
    found = differences(got, want, family.float32, **options)
    assert all(found[name] <= EXACT[name] for name in EXACT), found


@cache
def case(name):
    """A family, its model, a batch and what one device makes of it."""
    family = SERVED[name]
    model, batch = family.make(), batch_of(2, LENGTH)
    return family, model, batch, one_device(model, batch, family.labels)


COMBINATIONS = [(size, name) for size in (2, 3, 4) for name in ("ring", "ulysses", "hybrid")]
EVERYWHERE = COMBINATIONS[0], COMBINATIONS[4], COMBINATIONS[8]  # each size, each strategy


THOROUGH = FAMILIES if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else ("llama", "gpt_oss")


@pytest.mark.parametrize(
    ("name", "size", "strategy"),
    [(n, *c) for n in SERVED for c in (COMBINATIONS if n in THOROUGH else EVERYWHERE)],
)
def test_equals_one_device(name, size, strategy):
    """The whole product runs nightly and in `scripts/check/hugging_face.py`."""
    family, model, batch, want = case(name)
    for got in seqpar.simulate(size, on_rank, model, batch, strategy):
        check(got, want, family)


@pytest.mark.parametrize("name", SERVED)
def test_one_rank_equals_one_device(name):
    family, model, batch, want = case(name)
    check(on_rank(seqpar.Group.alone(), model, batch), want, family)


@pytest.mark.parametrize(
    ("size", "strategy", "options"),
    [
        (3, "allgather", {"kind": "balanced"}),
        (4, "mesh", {"kind": "striped"}),
        (3, "ring", {"kind": "contiguous", "multiple_of": 4}),
    ],
)
def test_other_strategies_and_layouts_equal_one_device(size, strategy, options):
    family, model, batch, want = case("mistral")
    for got in seqpar.simulate(size, lambda g: on_rank(g, model, batch, strategy, **options)):
        check(got, want, family)


@pytest.mark.parametrize("name", SERVED)
def test_what_judges_is_what_transformers_computes(name):
    """Eager attention takes its softmax in float32: 1e-5 is what it can say."""
    family, model, batch, want = case(name)
    eager = one_device(model, batch, family.labels, "eager")
    assert max(differences(eager, want).values()) < 1e-5


def step_of(group, name, strategy):
    family = FAMILIES[name]
    return on_rank(group, family.make(), batch_of(2, LENGTH), strategy)


@pytest.mark.parametrize(
    ("name", "size", "strategy"),
    [("gpt_oss", 3, "ring"), ("gemma2", 2, "ulysses"), ("modernbert", 2, "hybrid")],
)
def test_equals_one_device_over_processes(worlds, name, size, strategy):
    family, _, _, want = case(name)
    for got in worlds.run(size, step_of, name, strategy):
        check(got, want, family)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_under_autocast_errs_at_most_twice_as_one_device_does(name):
    """A loss is off by at most twice what its logits are, whichever way they are off."""
    family, batch = FAMILIES[name], batch_of(2, LENGTH)
    exact = one_device(family.make(spread=0.05), batch, family.labels)

    def in_bfloat16(group=None):
        model = family.make(torch.float32, spread=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            if group is None:
                return one_device(model, batch, family.labels, "sdpa")
            return on_rank(group, model, batch)

    allowed = differences(in_bfloat16(), exact)
    allowed["loss"] = max(allowed["loss"], allowed["logits"])
    for size in (2, 3):
        for got in seqpar.simulate(size, in_bfloat16):
            found = differences(got, exact)
            assert all(found[n] <= 2 * allowed[n] for n in allowed), (found, allowed)
