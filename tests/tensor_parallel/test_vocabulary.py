"""The loss over a sharded vocabulary is cross entropy; norms over a sharded width are norms of whole rows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqpar
from seqpar import DesyncError
from seqpar.tensor_parallel import vocabulary_cross_entropy
from seqpar.tensor_parallel.width import Width

EXACT = {"rtol": 1e-12, "atol": 1e-12}
LABELS = torch.tensor([[0, 49, -100], [17, 33, -100]])


def scores(vocabulary=50, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, vocabulary, generator=generator, dtype=dtype) * 30
    return logits, torch.randn(2, 3, generator=generator, dtype=torch.float64)


def whole_loss(logits, labels, weights):
    logits = logits.clone().requires_grad_()
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    (loss * weights).sum().backward()
    return loss.detach(), logits.grad


def sharded_loss(group, logits, labels, weights):
    mine = logits.chunk(group.size, -1)[group.rank].clone().requires_grad_()
    loss = vocabulary_cross_entropy(mine, labels, group, vocabulary=logits.shape[-1])
    (loss * weights).sum().backward()
    return loss.detach(), mine.grad


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_cross_entropy_for_any_split_of_the_vocabulary(size):
    """50 classes over 3 and 4 ranks are uneven; each token has a weight of its own."""
    logits, weights = scores()
    want, dlogits = whole_loss(logits, LABELS, weights)
    outs = seqpar.simulate(size, sharded_loss, logits, LABELS, weights)
    torch.testing.assert_close(torch.cat([d for _, d in outs], -1), dlogits, **EXACT)
    for got, _ in outs:
        torch.testing.assert_close(got, want, **EXACT)


def test_bfloat16_logits_have_float32_losses():
    logits, weights = scores(dtype=torch.bfloat16)
    want, dlogits = whole_loss(logits.double(), LABELS, weights)
    outs = seqpar.simulate(3, sharded_loss, logits, LABELS, weights)
    for got, _ in outs:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)
    grads = torch.cat([d for _, d in outs], -1).double()
    torch.testing.assert_close(grads, dlogits, rtol=2**-8, atol=1e-6)


def test_other_labels_are_ignored_when_told():
    logits, _ = scores()
    labels = LABELS.masked_fill(LABELS == -100, 7)
    want = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=7)

    def on_rank(group):
        mine = logits.chunk(group.size, -1)[group.rank]
        return vocabulary_cross_entropy(mine, labels, group, vocabulary=50, ignore_index=7)

    for got in seqpar.simulate(2, on_rank):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize(
    ("labels", "vocabulary", "message"),
    [
        (LABELS + 2, 51, r"labels must be 0 \.\.\. 50 or ignore_index, got 51"),
        (LABELS, 60, r"must be \(2, 3, 20\).*20 of 60 classes, got \(2, 3, 17\)"),
        (LABELS[:1], 51, r"must be \(1, 3, 17\)"),
        (LABELS, 4, "a vocabulary of 4 leaves some of 3 ranks without a class"),
    ],
)
def test_wrong_labels_and_parts_are_refused(labels, vocabulary, message):
    logits, _ = scores()

    def on_rank(group):
        with pytest.raises(ValueError, match=message):
            vocabulary_cross_entropy(logits[..., :17], labels, group, vocabulary=vocabulary)

    seqpar.simulate(3, on_rank)


def test_labels_that_differ_between_ranks_are_refused():
    logits, _ = scores(51)

    def on_rank(group):
        labels = LABELS.clone()
        labels[0, 0] = group.rank
        with pytest.raises(DesyncError, match="labels is"):
            vocabulary_cross_entropy(logits[..., :17], labels, group, vocabulary=51)

    seqpar.simulate(3, on_rank)


class Norm(nn.Module):
    """As those of transformers: casts, a mean of squares, a weight that is one more than the parameter."""

    def __init__(self, width):
        super().__init__()
        weight = torch.randn(width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        wide = x.to(torch.float64)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return ((wide * scale) * (1.0 + self.weight)).type_as(x)


def test_a_norm_over_a_sharded_width_is_that_of_whole_rows():
    generator = torch.Generator().manual_seed(2)
    x, dy = torch.randn(2, 2, 5, 12, generator=generator, dtype=torch.float64)
    whole, norm = x.clone().requires_grad_(), Norm(12)
    want = norm(whole)
    want.backward(dy)

    def on_rank(group):
        norm = Norm(12)
        norm.weight = nn.Parameter(norm.weight.detach().chunk(group.size)[group.rank])
        mine = x.chunk(group.size, -1)[group.rank].clone().requires_grad_()
        y = norm(Width.of(mine, group)).plain()
        assert type(y) is torch.Tensor
        y.backward(dy.chunk(group.size, -1)[group.rank])
        sent = group.traffic.by_primitive
        assert set(sent) == {"all_reduce"}
        assert sent["all_reduce"].elements == 2 * -(-2 * (group.size - 1) * 10 // group.size)
        return y.detach(), mine.grad, norm.weight.grad

    for size in (2, 3):
        y, dx, dw = (
            torch.cat(parts, -1) for parts in zip(*seqpar.simulate(size, on_rank), strict=True)
        )
        torch.testing.assert_close(y, want.detach(), **EXACT)
        torch.testing.assert_close(dx, whole.grad, **EXACT)
        torch.testing.assert_close(dw, norm.weight.grad, **EXACT)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.layer_norm(x, (4,)),
        lambda x: x.sum(-1),
        lambda x: torch.cat([x, x], -1),
        lambda x: x.mean(),
        lambda x: x.softmax(-1),
        lambda x: x[..., :2],
    ],
)
def test_what_may_need_whole_rows_is_refused(function):
    rows = Width.of(torch.ones(2, 4), seqpar.Group.alone())
    with pytest.raises(NotImplementedError, match="rows that are sharded over ranks"):
        function(rows)
