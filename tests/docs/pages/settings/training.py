"""What the Python of docs/training.md needs."""

import copy

import torch
import torch.nn.functional as F

import seqpar
from pages.models import AttentionModel


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
