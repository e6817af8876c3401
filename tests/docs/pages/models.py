"""Models of the kinds that readers have: their own, which calls attention, and one that lies in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import seqpar


class AttentionModel(nn.Module):
    """Embeddings, attention and a head, the same weights on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(16, 24), nn.Embedding(64, 24)
        self.head = nn.Linear(8, 16)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        layout: seqpar.Layout,
        group: seqpar.Group | None = None,
    ) -> Tensor:
        """Logits `[b sl 16]` of this rank's rows; of all processes where no group is given."""
        x = self.tokens(ids) + self.positions(positions)
        attend = seqpar.RingAttention(group or seqpar.Group.of(), mask=seqpar.Mask(causal=True))
        return self.head(attend(*x.unflatten(2, (1, 24)).chunk(3, dim=3), layout).flatten(2))


@contextmanager
def saved(model: Any) -> Iterator[str]:
    """A folder with a model of transformers, which writes on the first process only; the others copy it.

    Each has its own, because one may be done, and delete it, before another has read it.
    """
    with TemporaryDirectory() as path:
        model.save_pretrained(path)
        ranks = seqpar.Group.of().transport
        first = str(ranks.gather_objects(path)[0])
        if first != path:
            copytree(first, path, dirs_exist_ok=True)
        ranks.gather_objects("copied")
        yield path
