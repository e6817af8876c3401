"""Models whose attention is replaced equal one device: logits, loss, every gradient, for any tp and sp."""

from functools import cache

import pytest

import seqpar
from seqpar.testing.models.fused import FUSED, exactly, replaced_step
from seqpar.testing.models.tiny import batch_of
from seqpar.testing.models.training_step import differences, one_device

EXACT = 1e-11
LENGTH = 13
OTHER_TP = {  # besides 2 x 2: kv heads on several ranks, cut unevenly, or as the model's own are
    "falcon_7b": 4, "falcon_40b": 5, "codegen": 3, "mpt": 4, "phi3_medium": 4, "llama": 5, "dbrx": 3,
    "bloom": 3, "gpt_bigcode": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_float64():
    with exactly():
        yield


@cache
def case(name):
    """A family's model, a batch, and what one device makes of it, with the model's own attention."""
    family = FUSED[name]
    model, batch = family.make(), batch_of(2, LENGTH)
    return model, batch, one_device(model, batch, family.labels, "eager")


def check(got, want):
    found = differences(got, want)
    assert all(off <= EXACT for off in found.values()), found


@pytest.mark.parametrize(
    ("name", "tp", "sp"),
    [(name, 2, 2) for name in FUSED] + [(name, tp, 1) for name, tp in OTHER_TP.items()],
)
def test_equals_one_device(name, tp, sp):
    model, batch, want = case(name)
    for got in seqpar.simulate(tp * sp, replaced_step, model, batch, tp):
        check(got, want)


def step_of(group, name, tp):
    with exactly():
        return replaced_step(group, FUSED[name].make(), batch_of(2, LENGTH), tp, "ulysses")


def test_equals_one_device_over_processes(worlds):
    _, _, want = case("bloom")
    for got in worlds.run(4, step_of, "bloom", 2):
        check(got, want)
