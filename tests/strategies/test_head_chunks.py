"""Heads that are exchanged in chunks: the same results and bytes, in smaller buffers, with overlap."""

import threading
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import seqpar.strategies.ulysses
from seqpar import HybridAttention, Plan, RingAttention, UlyssesAttention, simulate
from seqpar.comm import Group, serve
from seqpar.functional import attention, attention_with_lse
from seqpar.layout import contiguous, split_heads, zigzag
from seqpar.strategies.head_chunks import Cut
from seqpar.testing import Case, errors_on_rank
from seqpar.testing.drawn import examples

HEADS = [(4, 4), (6, 2), (4, 1), (2, 2), (5, 5), (8, 2), (9, 3)]  # (hq, hkv)
NUM_CHUNKS = [1, 2, 3, 4]


@dataclass(frozen=True)
class ChunkedCase(Case):
    head_chunks: int = 1

    def plan(self, *args, **options):
        return replace(super().plan(*args, **options), head_chunks=self.head_chunks)


TERMS = {"alibi": True, "sinks": True, "dropout": 0.3}
CASES = [
    ChunkedCase(13, hq, hkv, d=4, vd=3, kind="zigzag", invariant=invariant, head_chunks=n, **extra)
    for (hq, hkv), n, (invariant, extra) in product(
        HEADS, NUM_CHUNKS, [(None, {}), (False, {}), (None, TERMS | {"kv_length": 9}), (False, TERMS)]
    )
]  # fmt: skip


def check(results):
    for rank, errors in enumerate(results):
        assert not errors.failures, f"rank {rank}: {errors.failures}"


@settings(max_examples=examples(0.7))
@given(case=st.sampled_from(CASES), size=st.integers(1, 5))
@example(ChunkedCase(7, 3, 1, head_chunks=2), 2)
@example(ChunkedCase(7, 4, 4, head_chunks=9), 3)
@example(ChunkedCase(0, 4, 2, head_chunks=2), 2)
@example(ChunkedCase(7, 9, 3, head_chunks=2), 2)
@example(ChunkedCase(40, 8, 2, dtype=torch.bfloat16, head_chunks=3, invariant=False), 2)
@example(ChunkedCase(40, 8, 1, dtype=torch.bfloat16, head_chunks=8, invariant=False), 1)
def test_ulysses_equals_one_device(case, size):
    """In float64 but for the order of summation; and the bytes are those of a dry run."""
    check(simulate(size, errors_on_rank, case, "ulysses", None, case.budget()))


@settings(max_examples=examples(0.35))
@given(
    case=st.sampled_from([c for c in CASES if c.invariant is False]),
    size=st.sampled_from([2, 4, 6]),
    degree=st.integers(1, 3),
)
def test_the_hybrid_equals_one_device(case, size, degree):
    case = replace(case, degree=degree)
    check(simulate(size, errors_on_rank, case, "hybrid", None, case.budget()))


@pytest.mark.parametrize("strategy", ["ulysses", "hybrid"])
@pytest.mark.parametrize(("hq", "hkv"), [(4, 4), (6, 2), (3, 1)])
def test_equals_one_device_over_processes(worlds, strategy, hq, hkv):
    case = ChunkedCase(21, hq, hkv, d=4, vd=4, sinks=True, degree=1, head_chunks=2, invariant=False)
    check(worlds.run(4, errors_on_rank, case, strategy))


def results(group, case):
    """out, lse and all gradients of this rank."""
    rows, cols = (x.positions(group.rank) for x in (case.layout(group.size), case.keys(group.size)))
    at = rows, cols, cols, rows
    q, k, v, dout = (x[:, held] for x, held in zip(case.tensors(), at, strict=True))
    plan = case.plan(group, "ulysses")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    leaves += plan.score.tensors.values()
    out, lse = attention_with_lse(q, k, v, plan)
    gradients = torch.autograd.grad((out, lse), leaves, (dout, dout[..., 0].to(lse.dtype)))
    return out.detach(), lse.detach(), *gradients


@pytest.mark.parametrize("terms", [{}, {"sinks": True, "alibi": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hq", "hkv"), [(4, 4), (6, 2), (4, 1), (5, 5)])
@pytest.mark.parametrize("size", [2, 3])
def test_no_bit_depends_on_the_number_of_chunks(size, hq, hkv, dtype, terms):
    """Sums over the query heads of a kv head keep their order, whichever chunks they are in."""
    case = ChunkedCase(37, hq, hkv, d=8, vd=8, dtype=dtype, invariant=True, **terms)
    one = simulate(size, results, case)
    for n in (2, 3, 4):
        more = simulate(size, results, replace(case, head_chunks=n))
        for a, b in zip(one, more, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), n


class Recorded:
    """A transport that notes when exchanges begin and end, and how many bytes are on the way."""

    def __init__(self, transport, events):
        self._transport, self._events = transport, events
        self.num, self.bytes, self.peak = 0, 0, 0

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def exchange(self, primitive, sends, receives, operation):
        pending = self._transport.exchange(primitive, sends, receives, operation)
        if "rows" not in primitive:  # the ranks agree on the call
            return pending
        return _RecordedPending(self, self._events, pending, [*sends, *receives])


class _RecordedPending:
    def __init__(self, transport, events, pending, messages):
        self._transport, self._events, self._pending = transport, events, pending
        self._bytes = sum(x.nbytes for _, x in messages)
        self._num = transport.num
        transport.num += 1
        transport.bytes += self._bytes
        transport.peak = max(transport.peak, transport.bytes)
        events.append(f"begin {self._num}")

    def wait(self):
        self._pending.wait()
        self._transport.bytes -= self._bytes
        self._events.append(f"wait {self._num}")


def test_the_next_chunk_is_on_its_way_while_one_is_attended(monkeypatch):
    """Forward and backward, there and back; at the ends there is nothing left to overlap with."""
    mine = threading.local()
    real = seqpar.strategies.ulysses.ring_attention

    def attend(*args, head, **options):
        out, lse = real(*args, head=head, **options)
        events = mine.events
        events.append(f"attend {head % 3}")
        out.register_hook(lambda _: events.append(f"backward {head % 3}"))
        return out, lse

    monkeypatch.setattr(seqpar.strategies.ulysses, "ring_attention", attend)

    def fn(group):
        mine.events = events = []
        transport = Recorded(group.transport, events)
        x = torch.ones(1, 4, 6, 2, requires_grad=True)
        plan = Plan(Group(transport), contiguous(8, 2), strategy="ulysses", head_chunks=3)
        out = attention(x, x, x, plan)
        forward = list(events)
        transport.num = 0
        events.clear()
        out.sum().backward()
        return forward, events

    there, back = (0, 1, 3), (2, 4, 5)  # forward, the numbers of the exchanges of each chunk
    for forward, backward in simulate(2, fn):
        assert forward == [
            f"begin {there[0]}",
            f"begin {there[1]}", f"wait {there[0]}", "attend 0", f"begin {back[0]}",
            f"begin {there[2]}", f"wait {there[1]}", "attend 1", f"wait {back[0]}", f"begin {back[1]}",
            f"wait {there[2]}", "attend 2", f"wait {back[1]}", f"begin {back[2]}",
            f"wait {back[2]}",
        ]  # fmt: skip
        dout, dx = (3, 1, 0), (5, 4, 2)
        assert backward == [
            f"begin {dout[2]}",
            f"wait {dout[2]}", f"begin {dout[1]}", "backward 2", f"begin {dx[2]}",
            f"wait {dout[1]}", f"begin {dout[0]}", "backward 1", f"begin {dx[1]}", f"wait {dx[2]}",
            f"wait {dout[0]}", "backward 0", f"begin {dx[0]}", f"wait {dx[1]}",
            f"wait {dx[0]}",
        ]  # fmt: skip


def test_buffers_shrink_with_the_number_of_chunks():
    """Of 4 chunks at most two are on their way there, and one back."""

    def peak(group, n):
        transport = Recorded(group.transport, [])
        x = torch.ones(1, 32, 8, 4)
        attention(
            x, x, x, Plan(Group(transport), contiguous(64, 2), strategy="ulysses", head_chunks=n)
        )
        return transport.peak  # fmt: skip

    (one, _), (four, _) = simulate(2, peak, 1), simulate(2, peak, 4)
    assert four * 12 == one * 7


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("num_chunks", [2, 3])
def test_checkpointing_leaves_no_exchange_half_done(num_chunks, use_reentrant):
    """Recomputation ends with the last attention, when the chunk before is on its way back."""
    case = ChunkedCase(9, 4, 4, d=4, vd=4, head_chunks=num_chunks)

    def fn(group, checkpointed):
        layout = case.layout(group.size)
        *xs, dout = (x[:, layout.positions(group.rank)] for x in case.tensors())
        plan = case.plan(group, "ulysses")
        xs = [x.requires_grad_() for x in xs]
        if checkpointed:
            args = {"use_reentrant": use_reentrant}
            out = torch.utils.checkpoint.checkpoint(attention, *xs, plan, **args)
        else:
            out = attention(*xs, plan)
        out.backward(dout)
        return [x.grad for x in xs]

    for a, b in zip(simulate(3, fn, False), simulate(3, fn, True), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_ranks_may_freeze_different_inputs(num_chunks):
    """Later chunks bring q only, where kv heads are shared: their backward must not hang on q."""

    def fn(group):
        q, k = torch.ones(1, 2, 4, 2), torch.ones(1, 2, 1, 2)
        (q if group.rank else k).requires_grad_()
        attend = UlyssesAttention(group, head_chunks=num_chunks)
        attend(q, k, k, contiguous(4, 2)).sum().backward()
        return (q if group.rank else k).grad

    assert all(dx is not None for dx in simulate(2, fn))


def test_a_backward_can_be_repeated():
    def fn(group):
        x = torch.ones(1, 2, 4, 2, requires_grad=True)
        out = UlyssesAttention(group, head_chunks=2)(x, x, x, contiguous(4, 2)).sum()
        first = torch.autograd.grad(out, x, retain_graph=True)
        return torch.equal(first[0], torch.autograd.grad(out, x)[0])

    assert all(simulate(2, fn))


def test_gradients_of_a_head_that_serves_many_are_added_in_float32():
    """In bfloat16, 256 + 1 is 256."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    ys = serve(x, [(slice(0, 1), 200), (slice(0, 1), 1), (slice(0, 1), 99)])
    assert torch.autograd.grad(ys, x, [torch.ones_like(y) for y in ys])[0].item() == 300


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 7), st.integers(1, 9))
@example(3, 3, 2, 2)  # heads 0-4 and 5-8: enough kv heads, but one is on both ranks
def test_chunks_have_every_head_once_and_runs_its_kv_head(hkv, group, size, num_chunks):
    heads = split_heads(hkv * group, hkv, size)
    cut = Cut.of(heads, num_chunks)
    assert len(cut.q) <= num_chunks
    assert len(cut.kv) in (1, len(cut.q))
    for rank, (start, stop) in enumerate(heads.q):
        mine = [range(*by_rank[rank]) for by_rank in cut.q]
        assert [head for part in mine for head in part] == list(range(start, stop))
        sizes = [len(part) for part in mine]
        assert max(sizes) - min(sizes) <= (group if len(cut.kv) > 1 else 1)
        kv_heads = [head for by_rank in cut.kv for head in range(*by_rank[rank])]
        assert kv_heads == list(range(*heads.kv[rank]))
        for chunk, in_order in product(range(len(cut.q)), (False, True)):
            kv_start = cut.kv[chunk if len(cut.kv) > 1 else 0][rank][0]
            met = []
            for run in cut.runs(chunk, rank, in_order=in_order):
                each = run.num_q // run.num_kv if run.num_kv else 0
                kv = [n for n in range(run.kv.start, run.kv.stop) for _ in range(each * run.group)]
                if in_order and heads.replicates:  # there are as many as query heads
                    kv = [(n + start) // group - kv_start for n in kv]
                met += zip(range(run.head, run.head + run.num_q), kv, strict=True)
            assert met == [(head, head // group - kv_start) for head in mine[chunk]]


WRONG = {
    "zero": ({"head_chunks": 0}, ValueError, "head_chunks must be at least 1, got 0"),
    "a flag": ({"head_chunks": True}, TypeError, "head_chunks must be an integer, got True"),
    "half": ({"head_chunks": 1.5}, TypeError, "head_chunks must be an integer, got 1.5"),
    "a ring": ({"head_chunks": 2, "strategy": "ring"}, ValueError, "head_chunks is for .*'ring'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_refused(name):
    options, error, message = WRONG[name]
    x = torch.ones(1, 4, 2, 2)
    plan = Plan(Group.alone(), contiguous(4, 1), **({"strategy": "ulysses"} | options))
    with pytest.raises(error, match=message):
        attention(x, x, x, plan)


def test_ranks_must_agree_on_chunks():
    def fn(group):
        x = torch.ones(1, 2, 4, 2)
        UlyssesAttention(group, head_chunks=1 + group.rank)(x, x, x, contiguous(4, 2))

    with pytest.raises(seqpar.DesyncError, match="head_chunks is 1 on rank 0, 2 on rank 1"):
        simulate(2, fn)


def test_modules_take_chunks():
    layout = zigzag(8, 2)

    def fn(group):
        modules = (
            UlyssesAttention(group, head_chunks=3),
            HybridAttention(group.grid(ulysses=2), head_chunks=2),
        )
        return [m.plan(layout).head_chunks for m in (*modules, RingAttention(group))]

    assert simulate(2, fn) == [[3, 2, 1]] * 2
