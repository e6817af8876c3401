"""A sharded cache equals one device: any layout, mask, score, number of ranks and of queries.

A failure of values here and not in `test_greedy` means a mask or a score term; of bytes, the formula.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seqpar import KVCache, Score, simulate
from seqpar.calls import Shape
from seqpar.decode import decode_volume
from seqpar.testing import Case, oracle
from seqpar.testing.drawn import expressions

EXACT = {"rtol": 1e-11, "atol": 1e-11}


@dataclass(frozen=True)
class Decode:
    """A case whose first `prefill` positions are sharded and whose others are appended in `steps`."""

    case: Case
    prefill: int
    steps: tuple[int, ...]
    queries: int  # how many, at the end

    @property
    def mask(self):
        """As the cache takes it: documents of the prefill, the last of them open."""
        if self.case.documents is None or self.case.shown is not None:
            return self.case.mask
        return replace(self.case.mask, documents=(*self.case.documents, self.prefill))

    def expected(self):
        c = self.case
        q, k, v, _ = c.tensors()
        seen = c.visible()
        return oracle.attention(q, k, v, seen, c.terms())[:, c.length - self.queries :]

    def layout(self, size):
        return replace(self.case, length=self.prefill).layout(size)


@st.composite
def decodes(draw):
    prefill = draw(st.integers(0, 40))
    steps = tuple(draw(st.lists(st.integers(1, 4), max_size=6)))
    length = prefill + sum(steps)
    hkv = draw(st.integers(1, 3))
    documents = None
    if draw(st.booleans()):
        documents = (0, *sorted(draw(st.lists(st.integers(0, prefill), max_size=3))))
    case = Case(
        length, hkv * draw(st.integers(1, 3)), hkv, draw(st.integers(1, 5)), draw(st.integers(1, 5)),
        draw(st.integers(1, 2)), causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 30)), scale=draw(st.sampled_from([None, -0.5])),
        kind=draw(st.sampled_from(["contiguous", "zigzag", "striped", "unsorted"])),
        shown=draw(st.none() | st.none() | expressions(length, packs=False)),
        softcap=draw(st.sampled_from([None, 3.0])), alibi=draw(st.booleans()),
        sinks=draw(st.booleans()), multiple_of=draw(st.integers(1, 3)), documents=documents,
    )  # fmt: skip
    return Decode(case, prefill, steps, draw(st.integers(0, min(length, 5))))


def grown(group, decode):
    """The cache after all steps, and the queries."""
    case, layout = decode.case, decode.layout(group.size)
    q, k, v, _ = case.tensors()
    slopes, sinks = (case.learned()[name] for name in ("slopes", "sinks"))
    mine = layout.positions(group.rank)
    cache = KVCache(
        group, layout, k[:, mine], v[:, mine], mask=decode.mask,
        score=Score(case.scale, case.softcap, slopes, sinks),
    )  # fmt: skip
    at = decode.prefill
    for step in decode.steps:
        cache.append(k[:, at : at + step], v[:, at : at + step])
        at += step
    assert cache.length == case.length == sum(cache.rows)
    return cache, q[:, case.length - decode.queries :]


def attended(group, decode):
    cache, q = grown(group, decode)
    group.traffic.reset()
    out = cache.attend(q)
    shape = Shape.of(q, *(x[:, :0] for x in decode.case.tensors()[1:3]))
    formula = decode_volume(decode.queries, group.rank, group.size, shape)
    assert group.traffic.total == formula
    return out


def check(results, decode):
    for out in results:
        torch.testing.assert_close(out, decode.expected(), **EXACT)
        assert torch.equal(out, results[0])


EVERY_TERM = Decode(
    Case(
        43, 6, 2, d=4, vd=3, batch=2, window=9, kind="zigzag", softcap=5.0, alibi=True, sinks=True,
        documents=(0, 5, 30),
    ),
    33, (3, 1, 1, 1, 4), 3,
)  # fmt: skip
# Of the last three rows the first sees all, and the others nothing.
SOME_SEE_NOTHING = Decode(
    Case(10, 2, 1, d=4, vd=4, shown=("rectangle", (0, 8), (0, None))), 8, (1, 1), 3
)
# Rank 0 of 2 holds 21 ... 27, then 0 ... 6, of which the query sees 6 alone.
UNSEEN_BETWEEN = Decode(Case(30, 2, 1, d=4, vd=4, kind="unsorted", window=24), 28, (1, 1), 1)
FEWER_ROWS_THAN_RANKS = Decode(Case(4, 2, 1, d=4, vd=4, kind="striped"), 2, (1, 1), 3)


@given(decode=decodes(), size=st.integers(1, 5))
@example(decode=EVERY_TERM, size=4)
@example(decode=UNSEEN_BETWEEN, size=2)
@example(decode=SOME_SEE_NOTHING, size=2)
@example(decode=FEWER_ROWS_THAN_RANKS, size=5)
@settings(deadline=None)
def test_the_last_queries_equal_one_device(decode, size):
    check(simulate(size, attended, decode), decode)


@pytest.mark.parametrize("decode", [EVERY_TERM, FEWER_ROWS_THAN_RANKS])
def test_the_last_queries_equal_one_device_in_processes(worlds, decode):
    for size in (2, 5):
        check(worlds.run(size, attended, decode), decode)
