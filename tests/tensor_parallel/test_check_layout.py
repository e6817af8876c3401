"""`check_layout` on a small attention of our own: what it survives, refuses, and leaves behind."""

import pytest
import torch
from torch import nn

from seqpar.tensor_parallel import FusedQKV, check_layout

D = 4


class Attention(nn.Module):
    """Attention over heads of 4 that splits as `order` and `blocks` say, written with views alone."""

    def __init__(self, hq=4, hkv=4, *, mask="causal", norm=None, sinks=0.0, v_bias=0.0, scale=True):
        super().__init__()
        self.hq, self.hkv, self.mask, self.norm = hq, hkv, mask, norm
        self.sinks, self.v_bias, self.scale = sinks, v_bias, scale
        self.fused = nn.Linear(8, (hq + 2 * hkv) * D, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(hq * D, 8)
        self.eval()

    def split(self, x):  # in parts: all of q, of k, of v
        q, k, v = x.split([self.hq * D, self.hkv * D, self.hkv * D], -1)
        return (y.unflatten(-1, (-1, D)).transpose(1, 2) for y in (q, k, v))

    def forward(self, x):
        q, k, v = self.split(self.fused(x))
        if self.norm == "head":
            q, k = (nn.functional.layer_norm(y, (D,)) for y in (q, k))
        if self.norm == "all":
            flat = q.transpose(1, 2).flatten(2)
            q = (
                nn.functional.layer_norm(flat, flat.shape[-1:])
                .unflatten(-1, (-1, D))
                .transpose(1, 2)
            )
        k, v = (y.repeat_interleave(self.hq // self.hkv, 1) for y in (k, v + self.v_bias))
        scores = (q @ k.mT / 2 if self.scale else q @ k.mT).clamp(-3, 3)
        rows = torch.arange(x.shape[1])
        ahead = rows[:, None] - rows
        if self.mask == "causal":
            scores = scores - 0.3 * ahead  # ALiBi
            scores = scores.masked_fill(ahead < 0, -1e9)
        if self.mask == "window":
            scores = scores.masked_fill((ahead < 0) | (ahead > 1), -1e9)
        weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + self.sinks)
        return self.out((self.dropout(weights) @ v).transpose(1, 2).flatten(2))


def check(layout, attention, length=5, fused="fused", out="out"):
    call = lambda: attention(torch.ones(1, length, 8))  # noqa: E731
    check_layout(layout, attention, fused=fused, out=out, call=call)


RIGHT = FusedQKV.contiguous(4, D)


@pytest.mark.parametrize(
    "terms", [{"mask": "window"}, {"mask": None}, {"norm": "head"}, {"v_bias": 0.5}, {"hkv": 2}]
)
@pytest.mark.parametrize("length", [3, 6])
def test_masks_windows_norms_and_a_bias_of_v_are_no_hindrance(terms, length):
    right = FusedQKV.contiguous(4, D, terms.get("hkv", 4))
    check(right, Attention(**terms), length)
    swapped = FusedQKV(4, right.num_kv_heads, D, order="kqv" if right.num_kv_heads == 4 else "qvk")
    with pytest.raises(ValueError, match="by the layout"):
        check(swapped, Attention(**terms), length)


def test_what_differs_is_named():
    with pytest.raises(
        ValueError, match=r"query head 0 .* row 0 is row 16 .* row 32, .*row 0 of k"
    ):
        check(FusedQKV(4, 4, D, order="qvk"), Attention())
    with pytest.raises(ValueError, match=r"rows 16 \.\.\. 19, .* q of head 0, hold no q only"):
        check(FusedQKV(4, 4, D, order="kqv"), Attention())
    with pytest.raises(ValueError, match=r"within query head 0 rows attend differently"):
        check(FusedQKV.contiguous(2, 2 * D), Attention())
    with pytest.raises(ValueError, match=r"query head 0 alone attends; .* change query heads 0, 1"):
        check(FusedQKV.contiguous(8, D // 2), Attention())


def test_heads_of_q_or_of_k_in_another_order_are_seen():
    class Reversed(Attention):
        def split(self, x):
            parts = list(super().split(x))
            parts[self.which] = parts[self.which].flip(1)
            return parts

    for which, message in enumerate(["q of head 0", "k of head 0", "given v of kv head 0"]):
        attention = Reversed()
        attention.which = which
        with pytest.raises(ValueError, match=message):
            check(RIGHT, attention)


def test_one_row_in_the_wrong_head_is_seen():
    class Shifted(Attention):
        def split(self, x):
            rows = torch.arange(x.shape[-1])
            rows[self.start + 3], rows[self.start + 4] = self.start + 4, self.start + 3
            return super().split(x[..., rows])

    for component, start in zip("qkv", (0, 16, 32), strict=True):
        attention = Shifted()
        attention.start = start
        with pytest.raises(ValueError, match=f"{component} of"):
            check(RIGHT, attention)


def test_attention_that_is_no_average_is_not_judged():
    with pytest.raises(NotImplementedError, match=r"out must read it, got 0\.\d+.* check_split"):
        check(RIGHT, Attention(sinks=1.0))


def test_a_norm_across_heads_is_refused():
    with pytest.raises(ValueError, match="query head 0 alone"):
        check(RIGHT, Attention(norm="all"))


@pytest.mark.parametrize(
    ("layout", "prepare", "message"),
    [
        (RIGHT, lambda a: a.train(), "eval mode"),
        (RIGHT, lambda a: a.bfloat16(), "float32 or wider"),
        (FusedQKV.contiguous(4, D, bias=True), None, "bias=True, but fused has none"),
        (FusedQKV.contiguous(4, D, transposed=True), None, "48 rows in its last dimension"),
        (FusedQKV.contiguous(4, D, 1), None, r"must have 24 rows .* got \(48, 8\)"),
        (FusedQKV.contiguous(10, D, 1), None, "out must read 40 numbers"),
    ],
)
def test_a_module_that_cannot_be_asked_is_refused(layout, prepare, message):
    attention = Attention()
    if prepare:
        prepare(attention)
    call = lambda: attention(torch.ones(1, 5, 8, dtype=attention.out.weight.dtype))  # noqa: E731
    with pytest.raises(ValueError, match=message):
        check_layout(layout, attention, fused="fused", out="out", call=call)


def test_a_call_that_does_not_fit_is_refused():
    attention = Attention()
    with pytest.raises(ValueError, match=r"one sequence of s >= 3 positions, got \(1, 2, 48\)"):
        check(RIGHT, attention, length=2)
    for call in (lambda: attention(torch.ones(2, 5, 8)), lambda: attention(torch.ones(1, 2, 8))):
        with pytest.raises(ValueError, match="one sequence"):
            check_layout(RIGHT, attention, fused="fused", out="out", call=call)
    with pytest.raises(ValueError, match="ran the first 0 times and never the second"):
        check_layout(RIGHT, attention, fused="fused", out="out", call=lambda: None)
    twice = lambda: (attention.fused(torch.ones(1, 5, 8)), attention(torch.ones(1, 5, 8)))  # noqa: E731
    with pytest.raises(ValueError, match="ran the first 2 times"):
        check_layout(RIGHT, attention, fused="fused", out="out", call=twice)


def test_the_module_is_left_as_it_was_also_after_an_error():
    attention = Attention()
    before = attention(torch.ones(1, 5, 8))

    def fail():
        attention.fused(torch.ones(1, 5, 8))
        raise RuntimeError("the model's own")

    with pytest.raises(RuntimeError, match="the model's own"):
        check_layout(RIGHT, attention, fused="fused", out="out", call=fail)
    with pytest.raises(ValueError, match="by the layout"):
        check(FusedQKV.per_head(4, D), attention)
    check(RIGHT, attention)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in attention.modules())
    after = attention(torch.ones(1, 5, 8))
    assert torch.equal(before, after)
    assert after.requires_grad
