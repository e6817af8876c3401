"""What a call has chosen is logged once, at INFO, by one rank, with the bytes that are counted."""

import logging
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import seqpar
from seqpar import Dropout, Mask, Plan, Score, attention, simulate
from seqpar.calls import announce
from seqpar.strategies import STRATEGIES

CAUSAL = Mask(causal=True)


@pytest.fixture
def heard(caplog):
    """The lines that the logger has had."""
    caplog.set_level(logging.INFO, logger="seqpar")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "seqpar"]


def tensors(layout, rank, hq=4, hkv=2, learns=True):
    shapes = ((layout.rows[rank], h, 4) for h in (hq, hkv, hkv))
    return [torch.randn(1, *shape, requires_grad=learns) for shape in shapes]


def call(group, plan):
    """Bytes that a call and its backward send."""
    group.traffic.reset()
    out = attention(*tensors(plan.layout, group.rank), plan)
    forward = group.traffic.total.bytes
    out.sum().backward()
    return forward, group.traffic.total.bytes - forward


def causal(group, strategy="ring", layout=seqpar.zigzag):
    grid = group.grid(ulysses=2) if strategy in ("mesh", "hybrid") else None
    return Plan(group, layout(16, group.size), CAUSAL, strategy=strategy, grid=grid)


def test_a_plan_is_told_in_one_line_whatever_the_seed_and_the_documents(heard):
    def fn(group):
        plan = causal(group)
        for step in range(4):
            packed = Mask(causal=True, documents=(0, 3 + step, 16))
            call(group, plan)
            call(group, replace(plan, mask=packed, dropout=Dropout(0.5, seed=step)))

    simulate(2, fn)
    begin = "ring attention over 2 ranks: zigzag 16 positions, causal"
    sizes = "batch 1, 4 heads (2 of keys) of width 4"
    plain, packed = heard()
    assert plain.startswith(f"{begin}, {sizes}, aten in float32 on cpu; rank 0 sends ")
    assert packed.startswith(
        f"{begin} documents, {sizes}, dropout 0.5, reference in float32 on cpu; "
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_bytes_are_those_that_are_counted(heard, strategy):
    sent = simulate(4, lambda group: call(group, causal(group, strategy)))
    (line,) = heard()
    assert line.startswith(f"{strategy} attention over 4 ranks")
    assert line.endswith("; rank 0 sends {} bytes forward, {} bytes backward".format(*sent[0]))


def test_whatever_is_chosen_anew_is_told_anew(heard):
    def fn(group):
        plan, learns = causal(group), torch.ones(4, requires_grad=True)
        other = seqpar.contiguous(20, group.size)
        others = [
            {"mask": Mask(causal=True, window=3)},
            {"mask": Mask()},
            {"layout": other},
            {"strategy": "allgather"},
            {"strategy": "ulysses", "head_chunks": 2},
            {"implementation": "reference"},
            {"strategy": "ulysses", "invariant": True},
            {"score": Score(softcap=2.0)},
            {"score": Score(sinks=learns)},
            {"score": Score(sinks=learns.detach(), alibi_slopes=learns)},
            {"dropout": Dropout(0.25, seed=1)},
        ]
        for change in [{}, *others] * 2:
            call(group, replace(plan, **change))
        q, k, v = tensors(plan.layout, group.rank)
        attention(q.double(), k.double(), v.double(), plan)
        attention(q[..., :2], k[..., :2], v, plan)
        attention(*tensors(plan.layout, group.rank, hkv=4), plan)
        attention(torch.cat([q, q]), torch.cat([k, k]), torch.cat([v, v]), plan)
        seqpar.attention_with_lse(q, k, v, plan)
        _, k, v = tensors(other, group.rank)
        hung = replace(plan.mask, align="bottom-right")
        attention(q, k, v, replace(plan, kv_layout=other, mask=hung))
        return len(others) + 7

    (num, _) = simulate(2, fn)
    assert len(set(heard())) == len(heard()) == num
    said = ("causal window 3,", "full,", "2 chunks of heads", "invariant bits", "softcap 2,")
    said += ("sinks that learn", "ALiBi slopes that learn, sinks,", "dropout 0.25", "with lse")
    said += ("in float64", "of width 2, 4 of values", "batch 2", "keys contiguous 20 positions")
    assert [part for part in said if not any(part in line for line in heard())] == []


def test_nothing_is_told_by_default_nor_by_one_rank_alone(caplog, heard, capfd):
    simulate(1, lambda group: call(group, causal(group)))
    caplog.set_level(logging.WARNING, logger="seqpar")
    told = simulate(2, lambda group: (call(group, causal(group)), group.told)[1])
    assert (heard(), told) == ([], [set(), set()])
    assert capfd.readouterr() == ("", "")


def test_what_is_remembered_has_an_end(heard, monkeypatch):
    monkeypatch.setattr(announce, "MOST", 3)

    def fn(group):
        for length in range(8, 20):
            call(group, Plan(group, seqpar.contiguous(length, 2), CAUSAL))
        return len(group.told)

    assert simulate(2, fn) == [3, 0]
    assert [re.findall(r"contiguous (\d+)", line) for line in heard()] == [["8"], ["9"], ["10"], []]
    assert heard()[-1] == "3 kinds of calls have been told; others of this group will not be"


def test_compiled_calls_are_told_without_a_break_of_the_graph(heard):
    def fn(group):
        layout, attend = seqpar.zigzag(16, 2), seqpar.RingAttention(group, mask=CAUSAL)
        run = torch.compile(
            lambda q, k, v: attend(q, k, v, layout), backend="aot_eager", fullgraph=True
        )
        for _ in range(2):
            run(*tensors(layout, group.rank)).sum().backward()
        return call(group, causal(group))

    torch._dynamo.reset()
    sent = simulate(2, fn)
    torch._dynamo.reset()
    (line,) = heard()
    assert line.endswith("rank 0 sends {} bytes forward, {} bytes backward".format(*sent[0]))


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_are_told_too(heard, without):
    """What they would send backward is known all the same."""

    def fn(group):
        layout, attend = seqpar.zigzag(16, 2), seqpar.RingAttention(group, mask=CAUSAL)
        with without():
            return attend(*(x.detach() for x in tensors(layout, group.rank)), layout)

    simulate(2, fn)
    (line,) = heard()
    assert "rank 0 sends 512 bytes forward" in line, line


def test_a_log_that_fails_on_one_rank_is_an_error_on_all():
    """It is one rank that writes, before which all agree: no rank may be left to wait for it."""

    def refuse(_):
        raise OSError("the disk is full")

    def fn(group):
        with pytest.raises((OSError, seqpar.DesyncError), match="the disk is full"):
            call(group, causal(group))

    announce.LOGGER.addFilter(refuse)
    level = announce.LOGGER.level
    announce.LOGGER.setLevel(logging.INFO)
    try:
        simulate(3, fn)
    finally:
        announce.LOGGER.setLevel(level)
        announce.LOGGER.removeFilter(refuse)


def offloaded(function, x):
    with torch.autograd.graph.save_on_cpu():
        return function(x)


def watched(function, x):
    with torch.autograd.detect_anomaly(check_nan=False):
        return function(x)


WAYS = {
    "plain": lambda function, x: function(x),
    "checkpoint": lambda function, x: checkpoint(function, x, use_reentrant=False),
    "kept": lambda function, x: checkpoint(
        function, x, use_reentrant=False, context_fn=seqpar.keep_attention
    ),
    "selective": lambda function, x: checkpoint(
        function, x, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts([torch.ops.aten.mul.Tensor]),
    ),
    "offloaded": offloaded,
    "watched": watched,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_what_is_on_where_a_call_is_told_changes_nothing(heard, strategy, name):
    """What a line says is learnt apart: not by the caller's hooks and modes, nor into its replay."""

    def fn(group):
        layout = seqpar.zigzag(16, 2)
        attend = {"ring": seqpar.RingAttention, "ulysses": seqpar.UlyssesAttention}[strategy](group)
        x = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def block(x):
            return x + attend(x.sin(), x.cos() * 2, x.tanh(), layout)

        return torch.autograd.grad(WAYS[name](block, x).square().sum(), x)[0]

    found = simulate(2, fn)
    (line,) = heard()
    assert "bytes backward" in line
    announce.LOGGER.setLevel(logging.WARNING)
    for here, there in zip(found, simulate(2, fn), strict=True):
        assert torch.equal(here, there)
