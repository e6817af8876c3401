"""`warm_up` makes what a step needs, and what fails in it fails on all ranks, before a message."""

import threading

import pytest
import torch
from on_cuda import OnCuda

from seqpar import (
    DesyncError,
    Group,
    Mask,
    Plan,
    Score,
    attention,
    attention_with_lse,
    shard_sequence,
    simulate,
    warm_up,
    zigzag,
)
from seqpar.calls import Shape, dry_run, resolve
from seqpar.strategies import STRATEGIES, loop

N, SIZE = 26, 4
ROUTES = [name for name, strategy in STRATEGIES.items() if not strategy.stores_scores]


def planned(group, strategy, score=None, **options):
    grid = group.grid(ulysses=2) if STRATEGIES[strategy].needs_grid else None
    return Plan(
        group, zigzag(N, group.size), Mask(causal=True, documents=(0, 11, N)), score or Score(),
        strategy=strategy, grid=grid, **options,
    )  # fmt: skip


def qkv(plan):
    torch.manual_seed(0)
    shapes = (1, N, 4, 8), (1, N, 2, 8), (1, N, 2, 8)
    return [shard_sequence(torch.randn(s), plan.layout, plan.group.rank) for s in shapes]


def warmed(group, strategy):
    """What a step after it makes anew; whether what warming up sent is what a step sends."""
    plan = planned(group, strategy)
    tensors = [x.requires_grad_() for x in qkv(plan)]
    before = [x.clone() for x in tensors]
    with torch.no_grad():
        warm_up(*tensors, plan)
    assert all(x.grad is None and torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    sent = group.traffic.total
    made, own = set(group.kept._made), set(plan.own._made)
    attention(*tensors, plan).sum().backward()
    new = set(group.kept._made) - made, set(plan.own._made) - own
    derived = dry_run.sent(resolve(plan, tensors[0], tensors[2]), Shape.of(*tensors), group.rank)
    return new, sent == derived.forward + derived.backward


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_after_it_makes_nothing_anew(strategy):
    assert simulate(SIZE, warmed, strategy) == [((set(), set()), True)] * SIZE


def with_everything(group):
    score = Score(sinks=torch.zeros(4, requires_grad=True), alibi_slopes=torch.ones(4))
    plan = planned(group, "ring", score)
    tensors = qkv(plan)
    warm_up(*tensors, plan, with_lse=True)
    assert score.sinks.grad is None
    return attention_with_lse(*tensors, plan)[1].shape


def test_learned_tensors_and_lse_are_warmed_up_too():
    assert simulate(2, with_everything) == [(1, 13, 4)] * 2


@pytest.mark.parametrize("strategy", ROUTES)
def test_what_fails_on_one_rank_is_an_error_on_all_before_a_message(strategy, monkeypatch):
    """Such as a kernel that does not compile, or has no room."""
    this_rank, real = threading.local(), loop.attend_backward

    def attend_backward(*args, **options):
        if getattr(this_rank, "fails", False):
            raise MemoryError("no room for the kernel")
        return real(*args, **options)

    monkeypatch.setattr(loop, "attend_backward", attend_backward)
    monkeypatch.setattr("seqpar_kernels.custom_ops.attend_backward", attend_backward)
    monkeypatch.setattr("seqpar_kernels.custom_ops.attend_whole_backward", lambda *_, **__: None)

    def rank_main(group):
        this_rank.fails = group.rank == 1
        plan = planned(group, strategy)
        kind = MemoryError if this_rank.fails else DesyncError
        with pytest.raises(kind, match="no room for the kernel"):
            warm_up(*qkv(plan), plan)
        return group.traffic.total.bytes

    assert simulate(SIZE, rank_main) == [0] * SIZE


def refused(group):
    plan = planned(group, "ring", implementation="triton")
    with pytest.raises(NotImplementedError, match="refuses float64"):
        warm_up(*(x.double() for x in qkv(plan)), plan)


def test_it_refuses_what_attention_refuses():
    simulate(2, refused)


def test_it_takes_a_plan():
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(TypeError, match=r"warm_up takes a seqpar\.Plan"):
        warm_up(x, x, x, "a plan")


def captured(group):
    plan = planned(group, "ring", implementation="reference")
    tensors = qkv(plan)
    with OnCuda(), pytest.raises(NotImplementedError, match="not captured in a CUDA graph"):
        attention(*tensors, plan)


def test_several_ranks_are_not_captured_in_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr("seqpar_kernels.custom_ops.nobody_looks", lambda _: True)
    simulate(2, captured)
    alone = planned(Group.alone(), "ring", implementation="reference")
    with OnCuda():
        assert attention(*qkv(alone), alone).shape == (1, N, 4, 8)


def test_compilers_are_told_not_to_capture_messages():
    ops, unsafe = torch.ops.seqpar, torch.Tag.cudagraph_unsafe
    assert unsafe in ops.sharded_attention.default.tags
    assert unsafe in ops.sharded_attention_backward.default.tags
    assert unsafe not in ops.attention_forward.default.tags
