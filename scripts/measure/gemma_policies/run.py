"""One model under one policy on this rank: a training step, its loss, and greedy generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from gemma_policies.gemma import Setting, batch_of, gemma_like, with_adapters
from gemma_policies.ways import Way
from seqpar import Group
from seqpar.data import IGNORE
from seqpar.tensor_parallel import vocabulary_cross_entropy

if TYPE_CHECKING:
    from transformers import DynamicCache

Job = Literal["generation", "LoRA step", "full step"]
PROMPT, LEARNING_RATE = 8, 0.05


@dataclass
class Run:
    """A model that was cut, and what it learns by. Logits are sharded to be learned from, else whole."""

    setting: Setting
    way: Way
    model: nn.Module
    optimizer: torch.optim.Optimizer
    tp: Group
    data: Group

    @staticmethod
    def of(group: Group, setting: Setting, way: Way, job: Job, dtype: torch.dtype) -> Run:
        """The same weights whatever the way. All ranks must call."""
        model: nn.Module = gemma_like(setting, dtype)
        if job == "LoRA step":
            model = with_adapters(model, setting)
        mesh = way.cut(model, group.size, logits="whole" if job == "generation" else "sharded")
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, LEARNING_RATE)
        tp, data = (Group.of(mesh[name]) if mesh else Group.alone() for name in ("tp", "data"))
        return Run(setting, way, model, optimizer, tp, data)

    def loss(self) -> Tensor:
        """The mean over all tokens but the first of each sequence, in this rank's rows of the batch."""
        ids = batch_of(self.setting).chunk(self.data.size)[self.data.rank]
        labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE)
        logits = self.model(input_ids=ids, use_cache=False).logits
        if self.way.is_cut:
            losses = vocabulary_cross_entropy(
                logits, labels, self.tp, vocabulary=self.setting.vocabulary
            )
        else:
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.sum() / (labels != IGNORE).sum()

    def step(self) -> float:
        """One step of training; the loss of the whole batch, the same on every rank."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        total = loss.detach().clone()
        self.data.all_reduce_(total, "sum")
        return float(total) / self.data.size

    @torch.no_grad()
    def logits(self, ids: Int[Tensor, "b s"]) -> Tensor:
        """Of all tokens."""
        return self.model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def generate(self, cache: DynamicCache) -> Iterator[int]:
        """Greedy tokens after a prompt, one sequence, for ever."""
        ids = batch_of(self.setting)[:1, :PROMPT]
        while True:
            out = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            yield int(ids)

    def cache(self) -> DynamicCache:
        """An empty one."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)
