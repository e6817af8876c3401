"""Every field of a plan is compared, recorded and handed to compiled code, by being a field."""

from dataclasses import fields, replace

import pytest
import torch

import seqpar
from seqpar import Dropout, Mask, Plan, Score, contiguous, masks, simulate, striped, zigzag
from seqpar.calls.options import SCHEMA, read, told_of, written
from seqpar.comm import silent

GROUP = silent(0, 4)
# By field, a value that is not the default, and another.
VALUES = {
    "layout": (zigzag(12, 4), striped(12, 4)),
    "mask": (Mask(window=(3, None), align="bottom-right"), Mask(documents=(0, 5, 12))),
    "score": (Score(0.5, softcap=2.0), Score(0.5, softcap=3.0)),
    "strategy": ("mesh", "ulysses"),
    "implementation": ("reference", "aten"),
    "dropout": (Dropout(0.5, 7), Dropout(0.5, 8)),
    "kv_layout": (contiguous(9, 4), contiguous(8, 4)),
    "invariant": (True, False),
    "grid": (GROUP.grid(ulysses=2), GROUP.grid(ulysses=1)),
    "head_chunks": (2, 3),
    "first_head": (4, 8),
    "agree": ("call", "plan"),
}
NAMES = [f.name for f in fields(Plan) if f.name != "group"]
PLAN = Plan(GROUP, **{name: value for name, (value, _) in VALUES.items()})


def test_all_fields_have_a_value_here():
    assert list(VALUES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_that_differs_in_one_field_is_told_apart(name):
    other = replace(PLAN, **{name: VALUES[name][1]})
    assert repr(told_of(other)) != repr(told_of(PLAN))
    assert repr(told_of(replace(PLAN))) == repr(told_of(PLAN))


def test_what_is_written_is_read_again():
    values = written(PLAN)
    assert len(values) == len(SCHEMA.split(", "))
    again = read(GROUP, iter(values))
    assert told_of(again) == told_of(PLAN)
    assert again.group is GROUP
    joined = Mask(True, 5, align="bottom-right") | masks.keys(0, 2)
    packed = Mask(documents=((0, 4, 8), (0, 3, 9)), align="top-left")
    either = (
        Mask(window=3), Mask(window=(3, None)), Mask(True, align="top-left"), Mask(documents=(0,)),
        joined, packed, joined & Mask(documents=(0, 3, 8)), masks.rectangle((2, 2)),
    )  # fmt: skip
    for mask in (*either, either):
        other = replace(PLAN, mask=mask)
        assert read(GROUP, iter(written(other))).mask == mask
    plain = Plan(GROUP, contiguous(4, 4))
    assert told_of(read(GROUP, iter(written(plain)))) == told_of(plain)


def test_layouts_of_one_name_and_other_spans_are_told_apart():
    named = replace(zigzag(12, 4), kind="contiguous")
    assert told_of(replace(PLAN, layout=named)) != told_of(replace(PLAN, layout=contiguous(12, 4)))


def test_tensors_are_told_by_their_type_alone():
    """Their values are weights: to compare them would cost a wait for the device in every call."""
    one, two = (replace(PLAN, score=Score(0.5, sinks=torch.full((4,), x))) for x in (1.0, 2.0))
    assert told_of(one) == told_of(two)
    assert told_of(one) != told_of(replace(PLAN, score=Score(0.5, sinks=torch.ones(4).double())))


def test_no_dropout_is_dropout_of_none():
    """A rank that says p = 0 and one that says nothing do the same."""

    def fn(group):
        plan = Plan(
            group, contiguous(4, group.size), dropout=Dropout(0.0, 1) if group.rank else None
        )
        x = torch.ones(1, 2, 1, 4)
        return seqpar.attention(x, x, x, plan)

    assert all(x.isfinite().all() for x in simulate(2, fn))
