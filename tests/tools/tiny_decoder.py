"""A tiny decoder of plain torch, whole or cut into stages, with MLPs or experts; its batches; one device.

How rows attend is handed to it: `dense` attends on one device, modules of seqpar on rows of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from spread_experts import WIDTH, Experts
from torch import Tensor, nn

from seqpar.testing import oracle

VOCABULARY, LENGTH, HEADS, DEPTH = 11, 13, 3, 4
IGNORE = -100
# Bounds of the documents that are packed into one sequence; a document may be one token.
PACKINGS = [(0, 5, LENGTH), (0, LENGTH), (0, 1, 2, 9, LENGTH), (0, 12, LENGTH)]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Attention, then what is done to each row: an MLP unless another module is given."""

    def __init__(self, feed_forward: nn.Module | None = None) -> None:
        super().__init__()
        # No bias: the gradient of that of keys is 0 but for rounding, which Adam makes a step of.
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.feed_forward = feed_forward or mlp

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).unbind(2)
        x = x + self.out(attend(q, k, v).flatten(2))
        return x + self.feed_forward(x)


class Decoder(nn.Module):
    """Embeddings of tokens and positions, blocks, a head. The same weights every time, in float64.

    Args:
        blocks: which of them are there; the first has the embeddings with it, the last the head.
        experts: makes what each block does to a row, if that is no MLP.
    """

    def __init__(
        self, blocks: Sequence[int] = range(DEPTH), experts: Callable[[], Experts] | None = None
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        made = (experts() if experts else None for _ in range(DEPTH))
        self.blocks = nn.ModuleDict({str(n): Block(x) for n, x in enumerate(made)})
        self.head = nn.Linear(WIDTH, VOCABULARY)
        generator = torch.Generator().manual_seed(0)
        self.double()
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=generator)
        # All weights are drawn, so that they do not depend on what is given up here.
        for n in set(range(DEPTH)) - set(blocks):
            del self.blocks[str(n)]
        if 0 not in blocks:
            del self.tokens, self.positions
        if DEPTH - 1 not in blocks:
            del self.head
        for module in self.modules():
            if isinstance(module, Experts):
                module.keep_own()

    @property
    def held(self) -> dict[str, slice]:
        """Which experts are here, by the names of their weights."""
        layers = {name: x for name, x in self.named_modules() if isinstance(x, Experts)}
        return {f"{name}.{w}": x.held for name, x in layers.items() for w in ("up", "down")}

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits of token ids, or what stands in place of either between stages."""
        if hasattr(self, "tokens"):
            x = self.tokens(x) + self.positions(positions)
        for block in self.blocks.values():
            x = block(x, attend)
        return self.head(x) if hasattr(self, "head") else x


class Packed(NamedTuple):
    """A sequence of packed documents `[1 s]`: labels are not shifted, positions restart."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    documents: tuple[int, ...]

    def losses(self, logits: Tensor) -> Tensor:
        """Of the rows whose next token is in their document and has a label."""
        labels = self.labels[0].roll(-1)
        labels[[end - 1 for end in self.documents[1:]]] = IGNORE
        counts = labels != IGNORE
        return F.cross_entropy(logits[0, counts], labels[counts], reduction="none")


def packed(step: int, replica: int, micro: int) -> Packed:
    """A micro-batch; of those of a step no two are packed alike."""
    generator = torch.Generator().manual_seed(100 * step + 10 * replica + micro)
    ids = torch.randint(VOCABULARY, (1, LENGTH), generator=generator)
    hidden = torch.rand(1, LENGTH, generator=generator) < 0.3
    documents = PACKINGS[(step + replica + micro) % len(PACKINGS)]
    positions = torch.arange(LENGTH)
    starts = torch.tensor(documents)[
        torch.bucketize(positions, torch.tensor(documents), right=True) - 1
    ]
    return Packed(ids, ids.masked_fill(hidden, IGNORE), (positions - starts)[None], documents)


def dense(documents: Sequence[int]) -> Attend:
    """Attention on one device, every row of a document over those up to it."""
    seen = oracle.visible(LENGTH, True, None, documents)
    terms = oracle.Terms((WIDTH // HEADS) ** -0.5)
    return lambda q, k, v: oracle.attention(q, k, v, seen, terms)


class Trained(NamedTuple):
    """By step the loss and the gradients by name, and the weights after the last."""

    losses: list[Tensor]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]

    def differences(self, whole: Trained) -> dict[str, float]:
        """The largest differences from what one device has of the same, over its largest value."""
        pairs = {
            "loss": list(zip(self.losses, whole.losses, strict=True)) if self.losses else [],
            "gradients": [
                (x, g[name])
                for mine, g in zip(self.gradients, whole.gradients, strict=True)
                for name, x in mine.items()
            ],
            "weights": [(x, whole.weights[name]) for name, x in self.weights.items()],
        }
        return {
            kind: max((float((x - y).abs().max() / y.abs().max()) for x, y in found), default=0.0)
            for kind, found in pairs.items()
        }

    def of(self, held: dict[str, slice]) -> Trained:
        """The same where a rank holds a part of some weights, by name."""

        def cut(named: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: x[held.get(name, slice(None))] for name, x in named.items()}

        return Trained(self.losses, [cut(x) for x in self.gradients], cut(self.weights))


def _whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


class Training:
    """Steps of Adam, and what they gave; of all parameters of some models, which have other names."""

    def __init__(self, *models: nn.Module) -> None:
        self._named = {name: p for model in models for name, p in model.named_parameters()}
        self._optimizer = torch.optim.Adam(self._named.values(), lr=0.01)
        self._losses: list[Tensor] = []
        self._gradients: list[dict[str, Tensor]] = []

    def finish(self, loss: Tensor | None) -> None:
        """Notes a step whose gradients are there, and its loss where that is known; and takes it."""
        if loss is not None:
            self._losses.append(loss.detach())
        self._gradients.append({name: _whole(p.grad) for name, p in self._named.items()})
        self._optimizer.step()
        self._optimizer.zero_grad()

    @property
    def result(self) -> Trained:
        weights = {name: _whole(p) for name, p in self._named.items()}
        return Trained(self._losses, self._gradients, weights)


@cache
def one_device(
    steps: int, replicas: int, micro: int, experts: Callable[[], Experts] | None = None
) -> Trained:
    """What torch alone gives on one device: the mean over all tokens of a step that have a label."""
    decoder = Decoder(experts=experts)
    training = Training(decoder)
    for step in range(steps):
        losses = []
        for sequence in (packed(step, r, m) for r in range(replicas) for m in range(micro)):
            logits = decoder(sequence.ids, sequence.positions, dense(sequence.documents))
            losses.append(sequence.losses(logits))
        loss = torch.cat(losses).mean()
        loss.backward()
        training.finish(loss)
    return training.result
