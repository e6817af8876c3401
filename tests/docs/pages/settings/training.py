"""What the Python of docs/training.md needs."""

import copy
import functools

import torch
import torch.nn.functional as F

import seqpar
from pages.models import AttentionModel
from seqpar.integrations.transformers import SequenceParallel
from seqpar.testing.models.tiny import FAMILIES, VOCABULARY


def one_rule():
    """The norm of the gradient is that of one device."""
    everyone = seqpar.Group.of()
    ids = torch.arange(26).reshape(2, 13) % 16
    batches = [{"input_ids": ids, "labels": ids}, {"input_ids": ids[:, :7], "labels": ids[:, :7]}]

    def token_losses(model, batch, layout):
        logits = model(batch["input_ids"], batch["position_ids"], layout)
        return F.cross_entropy(logits.mT, batch["labels"], reduction="none")

    model = AttentionModel()
    whole = copy.deepcopy(model)
    names = {"everyone": everyone, "model": model, "token_losses": token_losses}
    names["micro_batches"] = [seqpar.shard_batch(b, everyone, "zigzag") for b in batches]
    yield names
    alone = seqpar.Group.alone()
    sums = []
    for batch in batches:
        shard, layout = seqpar.shard_batch(batch, alone, "zigzag")
        logits = whole(shard["input_ids"], shard["position_ids"], layout, alone)
        sums.append(F.cross_entropy(logits.mT, shard["labels"], reduction="sum"))
    (sum(sums) / (2 * (12 + 6))).backward()
    torch.testing.assert_close(
        names["norm"], torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
    )


def data():
    dataset = [{"input_ids": torch.full((13,), n)} for n in range(8)]

    def collate(rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    names = {"dp": 2, "sp": 2, "dataset": dataset, "collate": collate}
    names |= {"first_epoch": 0, "last_epoch": 2}
    yield names
    assert names["layout"].length == 13


class Layer(torch.nn.Module):
    """Joins what it is given, and attends."""

    def __init__(self, width):
        super().__init__()
        self.join, self.qkv = torch.nn.Linear(width, 8), torch.nn.Linear(8, 24)

    def forward(self, x, layout, mask, group):
        x = self.join(x)
        qkv = self.qkv(x).unflatten(2, (3, 2, 4)).unbind(2)
        return x + seqpar.RingAttention(group, mask=mask)(*qkv, layout).flatten(2)


class SeveralTokens(torch.nn.Module):
    """A trunk, a head, and two blocks that predict further ahead."""

    def __init__(self, group):
        super().__init__()
        torch.manual_seed(0)
        self.group, self.first = group, Layer(16)
        self.tokens, self.positions = torch.nn.Embedding(16, 8), torch.nn.Embedding(64, 8)
        self.more, self.head = torch.nn.ModuleList([Layer(16), Layer(16)]), torch.nn.Linear(8, 16)
        self.double()

    def trunk(self, ids, positions, layout, mask):
        x = torch.cat([self.tokens(ids), self.positions(positions)], -1)
        return self.first(x, layout, mask, self.group)

    @property
    def blocks(self):
        def joined(layer, hidden, tokens, layout, mask):
            return layer(torch.cat([hidden, tokens], -1), layout, mask, self.group)

        return [functools.partial(joined, layer) for layer in self.more]


def several_tokens_ahead():
    """The gradients are those of one device, by labels and ids that are looked up token by token."""
    group, alone = seqpar.Group.of(), seqpar.Group.alone()
    ids = torch.arange(16)[None] * 7 % 16
    ids[:, 13:] = 0
    labels = ids.clone()
    labels[:, 13:] = -100
    bounds = [0, 4, 5, 13]
    names = {"group": group, "ids": ids, "labels": labels, "cu_seqlens": torch.tensor(bounds)}
    yield names | {"model": (model := SeveralTokens(group))}
    one, layout = SeveralTokens(alone), seqpar.contiguous(16, 1)
    mask = seqpar.Mask(causal=True, documents=(*bounds, 16))
    documents = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    hidden = one.trunk(ids, torch.arange(16)[None], layout, mask)
    total = 0
    for n in range(3):
        pairs = [(i, i + n + 1) for rows in documents for i in rows if i + n + 1 in rows]
        rows, targets = (list(each) for each in zip(*pairs, strict=True))
        loss = F.cross_entropy(one.head(hidden)[0, rows], ids[0, targets])
        total = total + (0.15 * loss if n else loss)
        if n < 2:
            taken = torch.zeros_like(ids)
            for i, j in pairs:
                taken[0, i] = ids[0, j]
            hidden = one.blocks[n](hidden, one.tokens(taken), layout, mask)
    total.backward()
    for got, want in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-11, atol=1e-11)


def tensors_beside():
    """The loss is that of one device."""
    group, alone = seqpar.Group.of(), seqpar.Group.alone()
    ids = torch.arange(26).reshape(2, 13) * 5 % 16
    names = {"group": group, "model": AttentionModel(), "ids": ids}
    names["advantages"] = torch.linspace(-1, 1, 26).reshape(2, 13)
    names["completion_mask"] = (torch.arange(13) > 6).expand(2, 13)
    names["old_logprobs"] = -torch.linspace(2, 3, 24).reshape(2, 12)
    yield names
    layout = seqpar.contiguous(13, 1)
    logits = AttentionModel()(ids, torch.arange(13).expand(2, -1), layout, alone)
    new = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    ratio, gain = (new - names["old_logprobs"]).exp(), names["advantages"][:, 1:]
    gains = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
    want = -gains[names["completion_mask"][:, 1:]].mean()
    torch.testing.assert_close(names["loss"], want)


def losses_that_compare():
    """The gradient of an embedding is that of one device."""
    model, group = FAMILIES["llama"].make(), seqpar.Group.of()
    alone = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (4, 13), generator=generator)
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    for row, end in enumerate((9, 13, 7, 12)):
        is_answer[row, 4:end] = True
    sp = SequenceParallel(model, seqpar.RingAttention(group))
    given = {"sp": sp, "ids": ids, "is_answer": is_answer, "group": group, "model": model}
    yield given | {"beta": 0.1}
    logprobs = alone(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    of_answers = (logprobs * is_answer[:, 1:]).sum(1) / is_answer.sum(1)
    chosen, rejected = of_answers.chunk(2)
    (-F.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, alone.lm_head.weight.grad)


class Recomputed(torch.nn.Module):
    """Attention and an MLP, each added to its input."""

    def __init__(self, group):
        super().__init__()
        self.attention = seqpar.RingAttention(group, mask=seqpar.Mask(causal=True))
        self.qkv, self.mlp = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

    def forward(self, x, layout):
        qkv = self.qkv(x).unflatten(2, (3, 2, 4)).unbind(2)
        x = x + self.attention(*qkv, layout).flatten(2)
        return x + self.mlp(x).sin()


class Lean(torch.nn.Module):
    """An embedding, two blocks and a head, the same weights on every rank."""

    def __init__(self, group):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16, bias=False)
        self.blocks = torch.nn.ModuleList(Recomputed(group) for _ in range(2))
        self.double()


def what_else_fills_memory():
    """The gradients are those of one device that saves nothing."""
    group, alone = seqpar.Group.of(), seqpar.Group.alone()
    ids = torch.arange(26).reshape(2, 13) * 5 % 16
    batch, layout = seqpar.shard_batch({"input_ids": ids, "labels": ids}, group)
    names = {"group": group, "layout": layout, "labels": batch["labels"]}
    names["model"] = model = Lean(group)
    yield names | {"hidden": model.embedding(batch["input_ids"])}
    one = Lean(alone)
    x, layout = one.embedding(ids), seqpar.contiguous(13, 1)
    for block in one.blocks:
        x = block(x, layout)
    F.cross_entropy(one.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for got, want in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-11, atol=1e-11)
