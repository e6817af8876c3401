"""Rows of a fused weight: the formula, split, fuse, shards and back, to the bit, for any sizes."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from seqpar.tensor_parallel import FusedQKV

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int8,
    torch.bool,
]
FALCON_7B = FusedQKV.contiguous(71, 2, 1)
PHI_MEDIUM = FusedQKV.contiguous(40, 2, 10)
CODEGEN = FusedQKV(16, 16, 2, blocks=4, order="qvk")


@st.composite
def layouts(draw):
    blocks, kv, group = (draw(st.integers(1, 4)) for _ in range(3))
    order = "".join(draw(st.permutations("qkv")))
    head_dim, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    heads = blocks * kv * group
    return FusedQKV(heads, blocks * kv, head_dim, blocks, order, transposed=transposed)


def numbered(layout, width=3, dtype=torch.float64):
    """A weight whose every number is its own; transposed where the layout is."""
    shape = (width, layout.rows) if layout.transposed else (layout.rows, width)
    return torch.arange(layout.rows * width).view(shape).to(dtype)


def rows_of(layout, x):
    return x.T if layout.transposed and x.ndim == 2 else x


@given(layout=layouts(), size=st.integers(1, 9))
@example(layout=FALCON_7B, size=4)
@example(layout=PHI_MEDIUM, size=4)
@example(layout=CODEGEN, size=3)
def test_shards_hold_their_heads_and_merge_to_the_same_bits(layout, size):
    size = min(size, layout.num_heads)
    dealt = layout.deal(size)
    for x in (numbered(layout), torch.arange(layout.rows)):
        shards = [layout.shard(x, rank, size) for rank in range(size)]
        for rank, shard in enumerate(shards):
            want = [
                row
                for component, start, stop in zip(
                    "qkv",
                    *zip(dealt.q[rank], dealt.kv[rank], dealt.kv[rank], strict=True),
                    strict=True,
                )
                for head in range(start, stop)
                for row in layout.index(component, head)
            ]
            assert torch.equal(rows_of(layout, shard), rows_of(layout, x)[want])
            assert rows_of(layout, shard).shape[0] > 0
        assert torch.equal(layout.merge(shards), x)


@given(layout=layouts())
@example(layout=CODEGEN)
def test_index_split_and_fuse_say_the_same(layout):
    seen = []
    for x in (numbered(layout), torch.arange(layout.rows)):
        parts = layout.split(x)
        for component, part in zip("qkv", parts, strict=True):
            heads = layout.num_heads if component == "q" else layout.num_kv_heads
            rows = [row for head in range(heads) for row in layout.index(component, head)]
            assert torch.equal(rows_of(layout, part), rows_of(layout, x)[rows])
            seen += rows
        assert torch.equal(layout.fuse(*parts), x)
    assert sorted(seen) == sorted(2 * list(range(layout.rows)))


def test_index_is_the_formula():
    for layout, (order, m_q, m_kv) in {
        CODEGEN: ("qvk", 4, 4),
        FusedQKV.per_group(12, 2, 4): ("qkv", 3, 1),
        FusedQKV.per_head(3, 5): ("qkv", 1, 1),
        PHI_MEDIUM: ("qkv", 40, 10),
    }.items():
        m = {"q": m_q, "k": m_kv, "v": m_kv}
        width = sum(m.values())
        for c in "qkv":
            before = sum(m[other] for other in order[: order.index(c)])
            for j in range(layout.num_heads if c == "q" else layout.num_kv_heads):
                start = ((j // m[c]) * width + before + j % m[c]) * layout.head_dim
                assert layout.index(c, j) == range(start, start + layout.head_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_dtype_comes_back(dtype, transposed):
    layout = FusedQKV.per_group(6, 2, 3, bias=True, transposed=transposed)
    for x in (numbered(layout).fmod(2).to(dtype), torch.ones(layout.rows).to(dtype)):
        shards = [layout.shard(x, rank, 4) for rank in range(4)]
        merged = layout.merge(shards)
        assert merged.dtype == dtype
        assert all(y.is_contiguous() for y in [*shards, merged])
        assert torch.equal(merged.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize(("layout", "size"), [(FALCON_7B, 4), (PHI_MEDIUM, 4), (CODEGEN, 5)])
def test_gradients_of_shards_are_those_of_the_weight(layout, size):
    x = numbered(layout).requires_grad_()
    y = torch.randn(size, layout.rows, 3, dtype=torch.float64)
    got = sum(
        (shard * y[rank, : len(shard)]).sum()
        for rank in range(size)
        for shard in [layout.shard(x, rank, size)]
    )
    want, dealt = torch.zeros_like(x), layout.deal(size)
    for rank in range(size):
        row = 0
        for component, start, stop in layout.runs(dealt, rank):
            for head in range(start, stop):
                at = list(layout.index(component, head))
                want[at] += y[
                    rank, row : row + layout.head_dim
                ]  # a copied head sums over its ranks
                row += layout.head_dim
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], want, rtol=1e-13, atol=1e-13)


def test_more_ranks_than_kv_heads_leave_none_without_heads():
    for layout in (FALCON_7B, PHI_MEDIUM):
        for size in range(1, 41):
            dealt = layout.deal(size)
            assert all(dealt.num_q(rank) and dealt.num_kv(rank) for rank in range(size))
            assert sum(dealt.num_q(rank) for rank in range(size)) == layout.num_heads
            assert dealt.replicates == (layout.num_kv_heads % size > 0)


def test_copies_are_compared_bit_by_bit():
    layout = FusedQKV.contiguous(4, 2, 1)
    x = torch.zeros(layout.rows, 3)
    x[8] = float("nan")
    shards = [layout.shard(x, rank, 2) for rank in range(2)]
    assert layout.merge(shards)[8].isnan().all()
    shards[1][-1] = -0.0
    with pytest.raises(ValueError, match="v of kv head 0 differs between ranks 0 and 1"):
        layout.merge(shards)
    shards[1][-3] += 1e-6
    with pytest.raises(ValueError, match=r"k of kv head 0 differs .* sum of their gradients"):
        layout.merge(shards)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "positive integers"),
        ({"head_dim": 2.0}, "positive integers"),
        ({"blocks": True}, "positive integers"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads, got 8 and 3"),
        ({"blocks": 4}, "4 blocks must hold equally many of the 8 query heads and of the 2"),
        ({"order": "qk"}, "once each, got 'qk'"),
        ({"order": "qqv"}, "once each"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(arguments, message):
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 4}
    FusedQKV(**sizes)
    with pytest.raises(ValueError, match=message):
        FusedQKV(**{**sizes, **arguments})
    with pytest.raises(ValueError, match="positive integers"):
        FusedQKV.contiguous(8, 4, 0)


@pytest.mark.parametrize("transposed", [False, True])
def test_tensors_of_other_rows_are_refused(transposed):
    layout = FusedQKV.contiguous(4, 2, 2, transposed=transposed)  # 16 rows
    for shape in [(15, 16)[:: 1 if not transposed else -1], (12,), (16, 16, 1), ()]:
        x = torch.zeros(shape)
        for use in (layout.split, lambda x: layout.shard(x, 0, 2)):
            with pytest.raises(ValueError, match="must have 16 rows"):
                use(x)
    q, _, v = layout.split(torch.zeros(16))
    with pytest.raises(ValueError, match="k must have 4 rows"):
        layout.fuse(q, q, v)
    with pytest.raises(ValueError, match="the shard of rank 1 of 2 must have 8 rows"):
        layout.merge([torch.zeros(8), torch.zeros(16)])


def test_shards_that_are_not_of_one_tensor_are_refused():
    layout = FusedQKV.contiguous(4, 2)
    one, other = (torch.zeros(12, 3) for _ in range(2))
    for wrong in (other.double(), torch.zeros(12, 2), torch.zeros(12)):
        with pytest.raises(ValueError, match="all shards must be alike"):
            layout.merge([one, wrong])


def test_ranks_that_cannot_be_dealt_heads_are_refused():
    layout = FusedQKV.per_group(8, 2, 2)
    x = numbered(layout)
    with pytest.raises(ValueError, match=r"8 query heads can be dealt to 1 \.\.\. 8 ranks, got 9"):
        layout.shard(x, 0, 9)
    with pytest.raises(ValueError, match=r"1 \.\.\. 8 ranks, got 0"):
        layout.merge([])
    with pytest.raises(ValueError, match=r"rank must be 0 \.\.\. 1, got 2"):
        layout.shard(x, 2, 2)
    with pytest.raises(ValueError, match=r"rank must be 0 \.\.\. 1, got -1"):
        layout.shard(x, -1, 2)
    with pytest.raises(
        ValueError, match=r"4 ranks cannot share 8 query heads .* 2 kv heads; take a"
    ):
        layout.shard(x, 0, 4, replicate=False)
    assert torch.equal(layout.shard(x, 0, 2, replicate=False), layout.shard(x, 0, 2))
    for component, head in (("x", 0), ("q", 8), ("k", 2), ("v", -1)):
        with pytest.raises(ValueError, match="must be"):
            layout.index(component, head)
