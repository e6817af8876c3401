"""The masks that people have, in every strategy: equal to a dense mask written from its definition.

In float64 only the order of summation may differ (1e-11): out, lse and the gradients of q, k and v.
"""

import pytest
import torch

import seqpar
from seqpar import Dropout, Mask, Plan, balanced, contiguous, masks, simulate, striped, zigzag
from seqpar.calls import Shape, dry_run
from seqpar.comm import silent
from seqpar.strategies import STRATEGIES

EXACT = {"rtol": 1e-11, "atol": 1e-11}
N, KEYS = 24, 17
HEADS, KV_HEADS, WIDTH = 4, 2, 8
CAUSAL = Mask(causal=True)
DOCUMENTS = (0, 5, 5, 14, 24)
BLOCKS = masks.every(5, N)
# (start of its segment, the starts and ends of the segments that it sees whole), by position of a tree.
SEGMENTS = {
    0: (0, 5, ()),
    1: (5, 9, (0,)),
    2: (9, 15, (0, 1)),
    3: (15, 18, (0, 1)),
    4: (18, 24, (0,)),
}


def of(bounds, x):
    """Which document, or block, a position is in."""
    return (x[..., None] >= torch.tensor(bounds)).sum(-1)


def same(bounds, i, j):
    return of(bounds, i) == of(bounds, j)


def inside(x, *spans):
    return sum((x >= a) & (x < b) for a, b in spans) > 0


def seen_in_tree(i, j):
    seen = torch.zeros(N, N, dtype=torch.bool)
    for start, stop, way in SEGMENTS.values():
        seen |= inside(i, (start, stop)) & inside(j, (start, stop)) & (j <= i)
        for n in way:
            seen |= inside(i, (start, stop)) & inside(j, SEGMENTS[n][:2])
    return seen


def video(i, j):
    """Frames of five positions see frames that are done, the one before whole, and text at the front."""
    return (of(BLOCKS, j) <= of(BLOCKS, i)) & ((of(BLOCKS, i) - of(BLOCKS, j) <= 1) | (j < 2))


# Each as the package has it, and from its definition, for rows i and keys j.
SAME = {
    "full": (Mask(), lambda i, j: (i >= 0) & (j >= 0)),
    "causal": (CAUSAL, lambda i, j: j <= i),
    "strictly causal": (masks.band(upper=-1), lambda i, j: j < i),
    "the future": (Mask(window=(0, None)), lambda i, j: j >= i),
    "causal window": (Mask(causal=True, window=4), lambda i, j: (j <= i) & (i - j < 4)),
    "window": (Mask(window=4), lambda i, j: (i - j).abs() < 4),
    "left and right": (Mask(window=(6, 2)), lambda i, j: (j >= i - 6) & (j <= i + 2)),
    "lookahead": (Mask(window=(None, 3)), lambda i, j: j <= i + 3),
    "a band behind": (masks.band(-9, -4), lambda i, j: (i - j >= 4) & (i - j <= 9)),
    "dilated": (
        masks.band(0, 0) | masks.band(-3, -3) | masks.band(-6, -6),
        lambda i, j: (i >= j) & ((i - j) % 3 == 0) & (i - j <= 6),
    ),
    "documents": (Mask(documents=DOCUMENTS), lambda i, j: same(DOCUMENTS, i, j)),
    "causal documents": (
        Mask(causal=True, documents=DOCUMENTS), lambda i, j: same(DOCUMENTS, i, j) & (j <= i)
    ),
    "windows in documents": (
        Mask(documents=DOCUMENTS) & Mask(window=(3, 1)),
        lambda i, j: same(DOCUMENTS, i, j) & (j >= i - 3) & (j <= i + 1),
    ),
    "chunks": (
        Mask(causal=True, documents=BLOCKS), lambda i, j: (i // 5 == j // 5) & (j <= i)
    ),
    "prefix": (masks.prefix_lm(7), lambda i, j: (j <= i) | (j < 7)),
    "prefixes in documents": (
        masks.prefix_lm([3, 1, 4, 20], DOCUMENTS),
        lambda i, j: same(DOCUMENTS, i, j) & ((j <= i) | inside(j, (0, 3), (5, 9), (14, 24))),
    ),
    "images in text": (
        CAUSAL | masks.spans([(2, 9), (13, 20)]),
        lambda i, j: (j <= i) | inside(i, (2, 9)) & inside(j, (2, 9))
        | inside(i, (13, 20)) & inside(j, (13, 20)),
    ),
    "images in packed text with a window": (
        (Mask(causal=True, window=6) | masks.spans([(2, 5), (15, 20)])) & Mask(documents=DOCUMENTS),
        lambda i, j: same(DOCUMENTS, i, j) & (
            (j <= i) & (i - j < 6) | inside(i, (2, 5)) & inside(j, (2, 5))
            | inside(i, (15, 20)) & inside(j, (15, 20))
        ),
    ),
    "block causal": (masks.block_causal(BLOCKS), lambda i, j: j // 5 <= i // 5),
    "blocks with context": (
        masks.block_causal(BLOCKS, back=1, ahead=2),
        lambda i, j: (i // 5 - j // 5 <= 1) & (j // 5 - i // 5 <= 2),
    ),
    "frames and text": (
        masks.block_causal(BLOCKS, back=1) | masks.block_causal(BLOCKS) & masks.keys(0, 2), video
    ),
    "first tokens": (
        Mask(causal=True, window=5) | CAUSAL & masks.keys(0, 3),
        lambda i, j: (j <= i) & ((i - j < 5) | (j < 3)),
    ),
    "global tokens": (
        Mask(window=3) | masks.global_tokens([(0, 1), (12, 14)]),
        lambda i, j: ((i - j).abs() < 3) | inside(i, (0, 1), (12, 14)) | inside(j, (0, 1), (12, 14)),
    ),
    "a prompt and answers": (
        masks.shared_prompt(9, [6, 3, 6]),
        lambda i, j: (j <= i) & ((j < 9) | same((0, 9, 15, 18), i, j)),
    ),
    "a tree": (masks.tree([5, 4, 6, 3, 6], [None, 0, 1, 1, 0]), seen_in_tree),
    "padding behind": (masks.keys(0, 19), lambda i, j: (i >= 0) & (j < 19)),
    "padding before": (CAUSAL & masks.keys(4), lambda i, j: (j <= i) & (j >= 4)),
    "two rectangles": (
        masks.rectangle((0, 10), (8, 20)) | masks.rectangle((6, 24), (0, 9)),
        lambda i, j: (i < 10) & (j >= 8) & (j < 20) | (i >= 6) & (j < 9),
    ),
    "nothing": (masks.rectangle((3, 3)), lambda i, j: (i < 0) & (j < 0)),
}  # fmt: skip

OF_Q, OF_K = (0, 9, 9, 20, 24), (0, 6, 8, 12, 17)


def crossed(shows, i, j, align):
    """Documents of queries over those of keys, with rows where `align` has them in each."""
    seen = torch.zeros(len(i), j.shape[1], dtype=torch.bool)
    for a, b, c, d in zip(OF_Q, OF_Q[1:], OF_K, OF_K[1:], strict=False):
        by = c - a if align == "top-left" else d - b
        seen |= inside(i, (a, b)) & inside(j, (c, d)) & shows(i + by, j)
    return seen


# Keys are another number than queries: 24 and 17.
OTHER = {
    "full": (Mask(), lambda i, j: (i >= 0) & (j >= 0)),
    "causal, top left": (Mask(causal=True, align="top-left"), lambda i, j: j <= i),
    "causal, bottom right": (Mask(causal=True, align="bottom-right"), lambda i, j: j <= i - 7),
    "window, bottom right": (
        Mask(window=(3, 2), align="bottom-right"), lambda i, j: (j >= i - 10) & (j <= i - 5)
    ),
    "padding": (masks.keys(2, 15), lambda i, j: (i >= 0) & (j >= 2) & (j < 15)),
    "documents": (
        Mask(documents=(OF_Q, OF_K)), lambda i, j: crossed(lambda i, j: (i < 99) & (j < 99), i, j, "top-left")
    ),
    "causal documents, top left": (
        Mask(True, documents=(OF_Q, OF_K), align="top-left"),
        lambda i, j: crossed(lambda i, j: j <= i, i, j, "top-left"),
    ),
    "windows in documents, bottom right": (
        Mask(window=(2, 1), documents=(OF_Q, OF_K), align="bottom-right"),
        lambda i, j: crossed(lambda i, j: (j >= i - 2) & (j <= i + 1), i, j, "bottom-right"),
    ),
    "documents but for padding": (
        Mask(True, documents=(OF_Q, OF_K), align="bottom-right") & masks.keys(0, 10),
        lambda i, j: crossed(lambda i, j: j <= i, i, j, "bottom-right") & (j < 10),
    ),
}  # fmt: skip
# One mask for each of three batch entries.
BY_ROW = {
    "padding": (
        [masks.keys(0, n) for n in (24, 11, 11)],
        lambda i, j: [(i >= 0) & (j < n) for n in (24, 11, 11)],
    ),
    "packed": (
        [Mask(True, documents=DOCUMENTS), CAUSAL & masks.keys(6), masks.prefix_lm(4)],
        lambda i, j: [same(DOCUMENTS, i, j) & (j <= i), (j <= i) & (j >= 6), (j <= i) | (j < 4)],
    ),
}  # fmt: skip
LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


def tensors(num_keys, batch=1):
    generator = torch.Generator().manual_seed(0)
    shapes = (N, HEADS), (num_keys, KV_HEADS), (num_keys, KV_HEADS), (N, HEADS)
    return [torch.randn(batch, *s, WIDTH, dtype=torch.float64, generator=generator) for s in shapes]


def dense(q, k, v, dout, seen):
    """(out, lse, dq, dk, dv) by autograd."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 2) for x in leaves[1:])
    s = torch.einsum("bihd,bjhd->bhij", leaves[0], k) / WIDTH**0.5
    s = s.masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0.0), -1) * ~empty
    out = torch.einsum("bhij,bjhd->bihd", p, v)
    lse = torch.logsumexp(s, -1).transpose(1, 2)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)


def check(group, strategy, kind, mask, num_keys, whole, expected, implementation):
    make = LAYOUTS.get(kind, lambda length, size: balanced(length, size, mask))
    layout, keys = (make(n, group.size) for n in (N, num_keys))
    degree = 2 if group.size % 2 == 0 else group.size
    grid = group.grid(ulysses=degree) if STRATEGIES[strategy].needs_grid else None
    plan = Plan(
        group,
        layout,
        mask,
        strategy=strategy,
        kv_layout=keys,
        grid=grid,
        implementation=implementation,
    )
    mine, held = layout.positions(group.rank), keys.positions(group.rank)
    q, k, v, dout = (x[:, at] for x, at in zip(whole, (mine, held, held, mine), strict=True))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = seqpar.attention(*leaves, plan)
    _, lse = seqpar.attention_with_lse(*(x.detach() for x in leaves), plan)
    found = out, lse, *torch.autograd.grad(out, leaves, dout)
    for got, want, at in zip(found, expected, (mine, mine, mine, held, held), strict=True):
        torch.testing.assert_close(got, want[:, at], **EXACT)


def solve(strategy, mask, shows, num_keys, runs):
    batch = len(mask) if isinstance(mask, list) else 1
    whole = tensors(num_keys, batch)
    seen = shows(torch.arange(N)[:, None], torch.arange(num_keys)[None])
    seen = torch.stack(seen).unsqueeze(1) if isinstance(seen, list) else seen.expand(N, num_keys)
    expected = dense(*whole, seen)
    for size, kind, implementation in runs:
        simulate(size, check, strategy, kind, mask, num_keys, whole, expected, implementation)


RUNS = (
    (1, "contiguous", None),
    (2, "zigzag", "reference"),
    (3, "striped", None),
    (4, "balanced", None),
    (8, "zigzag", None),
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SAME)
def test_equals_a_dense_mask(name, strategy):
    solve(strategy, *SAME[name], N, stored(strategy, in_turn(name, strategy, SAME)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", OTHER)
def test_equals_a_dense_mask_over_keys_of_another_length(name, strategy):
    solve(
        strategy,
        *OTHER[name],
        KEYS,
        stored(strategy, [run for run in RUNS if run[1] != "balanced"]),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", BY_ROW)
def test_equals_a_dense_mask_for_each_batch_entry(name, strategy):
    solve(strategy, *BY_ROW[name], N, stored(strategy, RUNS))


def in_turn(name, strategy, names):
    """Two of the runs, so that over the strategies each mask has all of them."""
    n = list(names).index(name) + list(STRATEGIES).index(strategy)
    return [RUNS[n % len(RUNS)], RUNS[(n + 2) % len(RUNS)]]


def stored(strategy, runs):
    """Stored scores are made by torch, or softened by Triton."""
    if not STRATEGIES[strategy].stores_scores:
        return runs
    return [(size, kind, None) for size, kind, _ in runs]


def dropped(group, implementation):
    """Batch entries of other masks that drop as one call of all would."""
    layout, mask = zigzag(N, group.size), [masks.prefix_lm(4), Mask(), Mask()]
    plan = Plan(
        group, layout, mask, dropout=Dropout(0.4, 5), implementation=implementation, strategy="ring"
    )
    q, k, v, dout = (x[:, layout.positions(group.rank)].float() for x in tensors(N, 3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = seqpar.attention(*leaves, plan)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_batch_entries_drop_by_where_they_are():
    alike = simulate(2, dropped, "reference"), simulate(2, dropped, "triton")
    for one, other in zip(*alike, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    full = [x[1:] for x in alike[0][0]]
    assert not torch.equal(full[0][0], full[0][1])


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "allgather"])
@pytest.mark.parametrize(
    "name", ["prefix", "images", "blocks", "answers", "first tokens", "by row"]
)
def test_memory_grows_with_the_sequence_and_not_its_square(name, strategy):
    """By a run without content, as much as the fullest moment of forward and backward holds."""

    def made(n):
        return {
            "prefix": masks.prefix_lm(n // 4),
            "images": CAUSAL | masks.spans([(n // 8, n // 4), (n // 2, n // 2 + n // 8)]),
            "blocks": masks.block_causal(masks.every(n // 8, n)),
            "answers": masks.shared_prompt(n // 2, [n // 4, n // 4]),
            "first tokens": Mask(causal=True, window=n // 8) | CAUSAL & masks.keys(0, 4),
            "by row": [masks.keys(0, n // 2), CAUSAL],
        }[name]

    def held(n):
        plan = Plan(silent(0, 2), zigzag(n, 2), made(n), strategy=strategy, implementation="aten")
        shape = Shape(2, HEADS, KV_HEADS, WIDTH, WIDTH, torch.float32)
        return dry_run.held(plan, shape, 0).peak

    assert held(4096) <= 2.5 * held(2048)
