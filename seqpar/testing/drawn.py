"""Hypothesis strategies for cases that break things: few tokens, odd heads, narrow windows, any size."""

from __future__ import annotations

from typing import Any

from seqpar.requires import require

require("hypothesis", by="seqpar.testing.drawn")

import torch
from hypothesis import settings
from hypothesis import strategies as st

from seqpar.layout import LAYOUTS
from seqpar.layout.mask_arguments import Align
from seqpar.testing.case import OWN, Case
from seqpar.testing.expressions import Expression

WORLD_SIZES = st.integers(1, 8)
KINDS = (*LAYOUTS, *OWN)
LENGTHS = st.one_of(
    st.integers(0, 9), st.integers(10, 80), st.sampled_from([97, 127, 128, 129, 193, 257, 300])
)
DTYPES = st.sampled_from([torch.float64] * 5 + [torch.float32, torch.bfloat16, torch.float16])

SCORE_TERMS = st.fixed_dictionaries(
    {},
    optional={
        "softcap": st.sampled_from([0.5, 5.0, 50.0]),
        "alibi": st.booleans(),
        "sinks": st.booleans(),
        "dropout": st.sampled_from([0.1, 0.5, 0.9]),
    },
)


BIASES = st.fixed_dictionaries(
    {},
    optional={
        "bias": st.sampled_from(["bhij", "hij", "ij", "bj", "i", ""]),
        "relative": st.tuples(st.sampled_from(["bh", "h", "b", ""]), st.integers(0, 12)),
    },
)
# Not in Triton's kernels.
ALL_TERMS = st.tuples(SCORE_TERMS, BIASES).map(lambda both: both[0] | both[1])


def examples(share: float) -> int:
    """So many of the examples of the profile in use: 2000 in `nightly`, 40 in `ci`."""
    return max(1, round(settings().max_examples * share))


def _documents(length: int) -> st.SearchStrategy[tuple[int, ...]]:
    borders = st.lists(st.integers(0, length), max_size=6).map(sorted)
    return borders.map(lambda inner: (0, *inner, length))


def _ends(length: int) -> st.SearchStrategy[tuple[int, int | None]]:
    two = st.tuples(*[st.integers(0, length + 2)] * 2).map(lambda x: (min(x), max(x)))
    return two | two.map(lambda x: (x[0], None)) | st.just((0, None))


def expressions(length: int, *, packs: bool) -> st.SearchStrategy[Expression]:
    """Masks of a few parts joined by `&` and `|`; documents among them if `packs`."""
    side = st.none() | st.integers(0, length + 2)
    parts: list[st.SearchStrategy[Any]] = [
        st.just(("causal",)),
        st.tuples(st.just("window"), side, side),
        st.tuples(st.just("rectangle"), _ends(length), _ends(length)),
    ]
    parts += [_documents(length).map(lambda bounds: ("documents", bounds))] if packs else []
    joined = st.sampled_from(["and", "or", "or"])
    return st.recursive(st.one_of(parts), lambda x: st.tuples(joined, x, x), max_leaves=5)


def _pairs(length: int, kv_length: int) -> st.SearchStrategy[Any]:
    """Documents of queries and of keys, as many of each."""
    two = st.tuples(_borders(length), _borders(kv_length))
    return two.map(lambda x: _evened(x, length, kv_length))


def _borders(length: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, length), min_size=3, max_size=3).map(sorted)


def _evened(inner: tuple[list[int], list[int]], *lengths: int) -> tuple[tuple[int, ...], ...]:
    return tuple((0, *x, length) for x, length in zip(inner, lengths, strict=True))


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: st.SearchStrategy[torch.dtype] = DTYPES,
    terms: st.SearchStrategy[dict[str, Any]] = st.just({}),  # noqa: B008 - a description
    lengths: st.SearchStrategy[int] = LENGTHS,
) -> Case:
    """Any legal attention problem, by default of up to 300 positions with a plain score."""
    length = draw(lengths)
    documents: Any = draw(st.none() | st.none() | _documents(length))
    kv_length = None if documents else draw(st.none() | st.none() | lengths)
    options = draw(terms)
    # ALiBi counts positions of the whole sequence.
    if kv_length is not None and not (options.keys() & {"alibi", "bias", "relative"}):
        documents = draw(st.none() | _pairs(length, kv_length))
    shown = draw(st.none() | st.none() | expressions(length, packs=kv_length is None))
    hkv = draw(st.integers(1, 5))
    side = st.none() | st.integers(0, length + 2)
    batch = draw(st.sampled_from([1, 1, 2]))
    by_row: tuple[Expression, ...] = ()
    if draw(st.integers(0, 5)) == 0:
        # Few different ones, so that neighbours are alike.
        some = st.lists(expressions(length, packs=kv_length is None), min_size=1, max_size=2)
        by_row = tuple(draw(st.lists(st.sampled_from(draw(some)), min_size=2, max_size=3)))
        batch = len(by_row)
    align: Align = draw(st.sampled_from(["top-left", "bottom-right"]))
    if ((shown or by_row) and kv_length is not None and kv_length < length) or "bias" in options:
        align = "top-left"  # the only one that ranges of keys take, or biases
    return Case(
        length=length,
        hq=hkv * draw(st.integers(1, 3)),
        hkv=hkv,
        d=draw(st.sampled_from([1, 3, 8, 16])),
        vd=draw(st.sampled_from([1, 5, 8, 16])),
        batch=batch,
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, length + 2) | st.tuples(side, side)),
        scale=draw(st.none() | st.sampled_from([0.3, -0.5, 0.0])),
        dtype=draw(dtypes),
        kind=draw(st.sampled_from(KINDS if kv_length is not None else (*KINDS, "balanced"))),
        documents=documents,
        kv_length=kv_length,
        align=align,
        multiple_of=draw(st.sampled_from([1, 1, 1, 4, 64])),
        degree=draw(st.integers(0, 3)),
        shown=shown,
        by_row=by_row,
        **options,
    )
