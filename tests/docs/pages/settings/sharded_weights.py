"""What the Python of docs/sharded-weights.md needs: steps of FSDP2 are those of one process."""

from tempfile import TemporaryDirectory

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F

from seqpar.comm import Group
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import VOCABULARY


def micro_batches(step, replica):
    """Two; replicas have other sequences, and other numbers of labels."""
    generator = torch.Generator().manual_seed(10 * step + replica)
    whole = torch.randint(VOCABULARY, (2, 2, 13), generator=generator)
    starts = 3 + 4 * replica + 2 * torch.arange(2)[:, None, None]  # of the answer
    labels = whole.masked_fill(torch.arange(13) < starts, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(whole, labels, strict=True)]


def steps_of(replica):
    return [micro_batches(step, replica) for step in range(3)]


def one_process():
    """The norm of the last step, the loss of its last micro-batch, and the weights."""
    model = FUSED["persimmon"].make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for micros in zip(steps_of(0), steps_of(1), strict=True):
        sums, count = [], 0
        for first, second in zip(*micros, strict=True):
            batch = {name: torch.cat([first[name], second[name]]) for name in first}
            logits, labels = model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
            sums.append(F.cross_entropy(logits.mT, labels, reduction="sum"))
            count += (labels != -100).sum()
        (sum(sums) / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (
        norm,
        (sums[-1] / count).detach(),
        {name: p.detach() for name, p in model.named_parameters()},
    )


def fully_shard():
    """The weights are those of one process, which reads them from the checkpoint too."""
    with TemporaryDirectory() as mine:
        folder = Group.of().transport.gather_objects(mine)[0]
        names = {"model": FUSED["persimmon"].make(), "steps_of": steps_of, "folder": folder}
        yield names
        norm, loss, weights = one_process()
        torch.testing.assert_close(names["norm"], norm, rtol=1e-10, atol=0)
        torch.testing.assert_close(names["loss"].detach(), loss, rtol=1e-10, atol=0)
        for name, p in names["model"].named_parameters():
            torch.testing.assert_close(p.full_tensor(), weights[name], rtol=1e-9, atol=1e-9)
        read = {name: torch.zeros_like(x) for name, x in weights.items()}
        dcp.load({"model": read}, checkpoint_id=folder, no_dist=True)
        torch.testing.assert_close(read, weights, rtol=1e-9, atol=1e-9)
        Group.of().transport.gather_objects("read")
