"""What cannot be served in torchtitan is refused on every rank. Skipped where test_torchtitan.py is."""

import re
from functools import partial

import pytest
import torch

pytest.importorskip("torchtitan", reason="torchtitan wants older packages than the lock has")

from titan_problem import BATCH, LENGTH, sequence, small_llama
from torch import nn
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims

import seqpar
from seqpar.integrations.torchtitan import parallelize


def as_it_is(model, **_):
    return model


def shared(make=small_llama, attend=seqpar.RingAttention, change=None, size=2, **changed):
    """A model that two ranks share, without FSDP."""
    parallelism = {k: v for k, v in changed.items() if k in ParallelismConfig.__dataclass_fields__}
    training = {k: v for k, v in changed.items() if k not in parallelism}
    config = ParallelismConfig(context_parallel_degree=2, **parallelism)
    model = make().model.build()
    if change is not None:
        change(model)
    given = {"seq_len": LENGTH, "disable_cuda_graphs": True} | training
    return parallelize(as_it_is, attend)(
        model,
        parallel_dims=ParallelDims.from_config(config, size),
        training=TrainingConfig(**given),
        parallelism=config,
    )


class Own(nn.Module):
    pass


def with_other_attention(model):
    model.layers["1"].attention = Own()


def with_other_masks(model):
    model.__class__ = type("Mine", (type(model),), {"get_attention_masks": lambda *_, **__: None})


def none(_):
    return None


def alone(_):
    return seqpar.RingAttention(seqpar.Group.alone())


WINDOWED = partial(seqpar.RingAttention, mask=seqpar.Mask(window=3))
REFUSED = {
    "CUDA graphs": ({"disable_cuda_graphs": False}, "disable_cuda_graphs"),
    "a balancer by masks": ({"context_parallel_load_balancer": "ptrr"}, "'ptrr'; take 'headtail' or"),
    "other attention": ({"change": with_other_attention}, "layer 1 attends by Own"),
    "other masks": ({"change": with_other_masks}, "Mine may mix tokens"),
    "masks of its own": ({"attend": WINDOWED}, "mask, score and dropout come from the layers"),
    "other ranks": ({"attend": alone}, "over the group that it is given"),
    "pipelines": ({"pipeline_parallel_degree": 2}, "pipelines; take parallelism.pipeline_parallel"),
    "no attention": ({"attend": none}, "attend must make a module"),
}  # fmt: skip


def told(act):
    try:
        act()
    except (ValueError, TypeError, NotImplementedError, seqpar.DesyncError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refused(group, cases):
    """What this rank is told, by case: a name of `REFUSED`, and the one rank that does so or `None`."""
    found = {}
    for name, only in cases:
        change, _ = REFUSED[name]
        is_wrong = only in (None, group.rank)
        found[name, only] = told(partial(shared, **(change if is_wrong else {}), size=group.size))
    return found


def assert_refused(found, table):
    for of_rank in found:
        for (name, only), text in of_rank.items():
            assert re.search(table[name][1], text), (name, only, text)


def test_what_cannot_be_right_is_refused_on_every_rank(unused_processes):
    cases = [(name, only) for name in REFUSED if name != "pipelines" for only in (None, 1)]
    assert_refused(unused_processes(2).run(refused, cases), REFUSED)
    assert_refused(unused_processes(4).run(refused, [("pipelines", None)]), REFUSED)


CALLS = {
    "whole": ("", "does the trainer shard them, and only once"),
    "without positions": ("", "call the model with positions="),
    "with masks": ("", "leave attention_masks out"),
    "in another order": ("", "are they sharded as"),
}


def call(model, group, change):
    """Calls a model with this rank's rows, or with something else."""
    make = seqpar.contiguous if change == "in another order" else seqpar.zigzag
    tokens, positions, _ = map(torch.stack, zip(*map(sequence, range(BATCH)), strict=True))
    mine = partial(seqpar.shard_sequence, layout=make(LENGTH, group.size), rank=group.rank)
    tokens, positions = (mine(x).clone() for x in (tokens, positions))  # without a mark
    if change == "whole":
        tokens, positions = (x.repeat(1, group.size) for x in (tokens, positions))
    given = {} if change == "without positions" else {"positions": positions}
    if change == "with masks":
        given["attention_masks"] = {}
    model(tokens, **given)


def called(group, cases):
    """As `refused`, of calls."""
    model, found = shared(), {}
    for name, only in cases:
        change = name if only in (None, group.rank) else None
        found[name, only] = told(partial(call, model, group, change))
    return found


def test_calls_with_other_rows_are_refused_on_every_rank(unused_processes):
    cases = [(name, only) for name in CALLS for only in (None, 1)]
    assert_refused(unused_processes(2).run(called, cases), CALLS)


def test_one_rank_alone_has_what_torchtitan_applies():
    config = ParallelismConfig()
    dims = ParallelDims.from_config(config, 1)
    model = small_llama().model.build()
    inner = model.layers["0"].attention.inner_attention
    assert parallelize(as_it_is, seqpar.RingAttention)(model, parallel_dims=dims) is model
    assert model.layers["0"].attention.inner_attention is inner
