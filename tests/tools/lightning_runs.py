"""A LightningModule on shared sequences, and the same steps by hand in one process."""

import os
import warnings
from dataclasses import dataclass

import lightning
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import seqpar
from seqpar.integrations.lightning import SequenceParallelFSDPStrategy, SequenceParallelStrategy
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import VOCABULARY

BATCH, CLIP = 2, 0.1
SEQUENCES, EPOCHS = 36, 4


def sequences(count=SEQUENCES):
    """Of one length; of most, many tokens are a prompt, which has no labels."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (count, 13), generator=generator)
    return [
        {"input_ids": x, "labels": torch.where(torch.arange(13) < 11 * n % 13, -100, x)}
        for n, x in enumerate(ids)
    ]


@dataclass(frozen=True)
class Run:
    """A run, where a step is eight sequences, two at a time on each replica."""

    attend: type = seqpar.RingAttention
    ranks: int = 2
    fsdp: bool = False
    micro: int = 2
    epochs: int = EPOCHS


class Module(lightning.LightningModule):
    """A model of transformers as a user of Lightning has it.

    Args:
        by_token: whether it computes the losses of tokens itself.
    """

    def __init__(self, *, by_token=False):
        super().__init__()
        self.by_token = by_token
        self.model, self.sp = FUSED["persimmon"].make(), None
        self.losses, self.norms, self.evaluated = [], [], []

    def configure_model(self):
        if self.sp is None:
            strategy = self.trainer.strategy
            self.sp = strategy.sequence_parallel(self.model)
            if isinstance(strategy, SequenceParallelFSDPStrategy):
                fully_shard(self.model)

    def training_step(self, batch, _):
        strategy = self.trainer.strategy
        if self.by_token:
            inputs = self.sp.shard(batch)
            logits = self.model(**inputs).logits
            losses = F.cross_entropy(logits.mT, inputs.labels, reduction="none")
            loss = strategy.mean_loss(losses, valid=inputs.labels != -100)
        else:
            loss = strategy.loss(self.sp, batch)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, _):
        self.log("evaluated", self.trainer.strategy.loss(self.sp, batch))

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.evaluated.append(self.trainer.callback_metrics["evaluated"])

    def on_before_optimizer_step(self, _):
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])
        self.norms.append(full(norm))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def full(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def as_torchrun_starts_it(group):
    """Tells Lightning which process of how many this one is."""
    rank, size = str(group.rank), str(group.size)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "GROUP_RANK": "0"}
    os.environ["TORCHELASTIC_RUN_ID"] = "a test"
    warnings.simplefilter("ignore")  # of loaders without workers, and the like


def trainer_of(group, strategy, **options):
    as_torchrun_starts_it(group)
    return lightning.Trainer(
        accelerator="cpu", devices=group.size, strategy=strategy, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def trained(group, run, folder, resume=None):
    """What Lightning makes of epochs of five steps, and its checkpoint."""
    kind = SequenceParallelFSDPStrategy if run.fsdp else SequenceParallelStrategy
    trainer = trainer_of(
        group, kind(run.attend, run.ranks), max_epochs=run.epochs, default_root_dir=folder,
        accumulate_grad_batches=run.micro, gradient_clip_val=CLIP,
    )  # fmt: skip
    module, data = Module(by_token=run.fsdp), sequences()
    loaders = DataLoader(data, BATCH), DataLoader(data[:8], BATCH)
    trainer.fit(module, *loaders, ckpt_path=resume)
    weights = {n: full(p) for n, p in module.named_parameters()}
    found = module.losses, module.norms, module.evaluated, weights
    return found, trainer.checkpoint_callback.best_model_path


def token_losses(model, batch):
    logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-100), labels != -100


def by_hand():
    """The same in one process: four sequences at a time, which two replicas have, and the mean over eight.

    The last step of an epoch has but four.
    """
    model, data = FUSED["persimmon"].make(), sequences()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses, norms, evaluated = [], [], []
    sampler = DistributedSampler(data, 1, 0)  # Lightning shuffles so, for any number of replicas
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        batches = list(DataLoader(data, 4, sampler=sampler))
        for start in range(0, len(batches), 2):
            found = [token_losses(model, batch) for batch in batches[start : start + 2]]
            losses += [x[counts].mean().detach() for x, counts in found]
            loss = torch.cat([x[counts] for x, counts in found]).mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
            optimizer.step()
        with torch.no_grad():
            found = [token_losses(model, batch) for batch in DataLoader(data[:8], 4)]
        evaluated.append(torch.stack([x[counts].mean() for x, counts in found]).mean())
    weights = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    return losses, norms, evaluated, weights
