"""What every rank does under one policy: results to compare, collectives to count, times, bytes held."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

from policies.model import Sizes, batch_of, gemma_like, with_adapters
from policies.ways import Way
from seqpar import Group
from seqpar.comm.collectives import Collectives

PROMPT, STEPS, LEARNING_RATE = 8, 3, 0.05


@dataclass
class Run:
    """A model under a policy on this rank."""

    sizes: Sizes
    way: Way
    mesh: DeviceMesh | None
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @staticmethod
    def of(group: Group, sizes: Sizes, way: Way, dtype: torch.dtype, *, adapters: bool) -> Run:
        """The model, cut; the same weights in every way."""
        model: nn.Module = gemma_like(sizes, dtype)
        if adapters:
            model = with_adapters(model, sizes)
        mesh = way.mesh(group)
        way.cut(model, mesh)
        learning = [p for p in model.parameters() if p.requires_grad]
        return Run(sizes, way, mesh, model, torch.optim.SGD(learning, LEARNING_RATE))

    def step(self) -> float:
        """One training step; the loss of the whole batch."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def loss(self) -> Tensor:
        ids = batch_of(self.sizes)
        return self.model(input_ids=ids, labels=ids).loss

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Of all tokens, whole."""
        return self.model(input_ids=ids).logits

    @torch.no_grad()
    def generate(self, tokens: int) -> Iterator[int]:
        """Greedy tokens after a prompt, one at a time, with a cache."""
        cache = DynamicCache(config=self.model.config)
        ids = batch_of(self.sizes)[:1, :PROMPT]
        for _ in range(tokens):
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            yield int(ids)
