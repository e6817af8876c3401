"""`ByteLM`: a causal transformer over bytes whose only communication is in its attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import seqpar
from byte_lm.recipe import Recipe
from seqpar import Layout
from seqpar.data import IGNORE

VOCABULARY = 256


class Block(nn.Module):
    """Attention with grouped heads and rotary positions, then an MLP, each added to its input."""

    def __init__(self, recipe: Recipe, attention: nn.Module) -> None:
        super().__init__()
        e, d = recipe.dim, recipe.dim // recipe.heads
        self.head_width, self.norm = d, nn.RMSNorm(e, eps=1e-5)
        self.q, self.out = nn.Linear(e, e, bias=False), nn.Linear(e, e, bias=False)
        self.k, self.v = (nn.Linear(e, recipe.kv_heads * d, bias=False) for _ in range(2))
        self.attention = attention
        up, down = nn.Linear(e, 4 * e, bias=False), nn.Linear(4 * e, e, bias=False)
        self.mlp = nn.Sequential(nn.RMSNorm(e, eps=1e-5), up, nn.GELU(), down)
        self.checkpointing, self.mlp_tile = recipe.checkpointing, recipe.mlp_tile

    def forward(
        self, x: Float[Tensor, "b sl e"], position_ids: Int[Tensor, "b sl"], layout: Layout
    ) -> Float[Tensor, "b sl e"]:
        """The rows that this rank holds, after the block. All ranks must call."""
        run: Callable[..., Tensor] = self._forward
        # Inside forward, so that what wraps a block (FSDP) need not know that it runs twice.
        if self.checkpointing == "full":
            run = partial(checkpoint, run, use_reentrant=False)
        elif self.checkpointing == "keep-attention":
            run = partial(checkpoint, run, use_reentrant=False, context_fn=seqpar.keep_attention)
        return run(x, position_ids, layout)

    def _forward(self, x: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(2, (-1, self.head_width)) for f in (self.q, self.k, self.v))
        q, k = rotate(q, position_ids), rotate(k, position_ids)
        x = x + self.out(self.attention(q, k, v, layout).flatten(2))
        if self.mlp_tile:
            return x + seqpar.tiled(self.mlp, x, tile=self.mlp_tile)
        after: Tensor = x + self.mlp(x)
        return after


def rotate(
    x: Float[Tensor, "b sl h d"], position_ids: Int[Tensor, "b sl"]
) -> Float[Tensor, "b sl h d"]:
    """Queries or keys, turned by their rotary positions."""
    exponents = torch.linspace(0, 1, x.shape[3] // 2 + 1, dtype=torch.float64, device=x.device)[:-1]
    angles = position_ids[..., None, None] / 1e4**exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=3)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=3)


class ByteLM(nn.Module):
    """Replicated, or sharded by FSDP: equal recipes start with equal weights.

    Args:
        make_attention: makes the attention of one block.
    """

    def __init__(self, recipe: Recipe, make_attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, recipe.dim)
        self.blocks = nn.ModuleList(Block(recipe, make_attention()) for _ in range(recipe.layers))
        self.norm = nn.RMSNorm(recipe.dim, eps=1e-5)
        self.head = nn.Linear(recipe.dim, VOCABULARY, bias=False)
        self.loss_tile, self.saved_on = recipe.loss_tile, recipe.saved_on
        # A generator of its own: simulated ranks are threads, which share torch's global one.
        generator = torch.Generator().manual_seed(recipe.seed)
        # Attention counts from the first step, so that wrong attention shows in the first losses.
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 1.0 if name == "embedding.weight" else p.shape[1] ** -0.5
                nn.init.normal_(p, std=std, generator=generator)
        self.to(getattr(torch, recipe.dtype))

    def forward(
        self,
        input_ids: Int[Tensor, "b sl"],
        labels: Int[Tensor, "b sl"],
        position_ids: Int[Tensor, "b sl"],
        layout: Layout,
    ) -> Float[Tensor, "b sl"]:
        """The loss of each row here, 0 where the label is -100. All ranks must call.

        Losses are computed in here and not from logits outside, because FSDP has the weight of the head
        at hand in here only.
        """
        hidden = self._hidden(input_ids, position_ids, layout)
        return token_losses(hidden, self.head.weight, labels, tile=self.loss_tile)

    def logits(
        self, input_ids: Int[Tensor, "b sl"], position_ids: Int[Tensor, "b sl"], layout: Layout
    ) -> Float[Tensor, "b sl 256"]:
        """The logits of the rows that this rank holds. All ranks must call."""
        logits: Tensor = self.head(self._hidden(input_ids, position_ids, layout))
        return logits

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        x = self.embedding(input_ids)
        with seqpar.saved_on_host() if self.saved_on == "host" else nullcontext():
            for block in self.blocks:
                x = block(x, position_ids, layout)
        normed: Tensor = self.norm(x)
        return normed


def token_losses(
    hidden: Float[Tensor, "b sl e"],
    weight: Float[Tensor, "v e"],
    labels: Int[Tensor, "b sl"],
    *,
    tile: int,
) -> Float[Tensor, "b sl"]:
    """Cross entropy of hidden @ weight.T with labels, row by row, in float32 or wider.

    Args:
        tile: how many rows have logits at a time, so that their memory does not grow with sl; 0: all rows,
            kept for backward.
    """
    if tile:
        return seqpar.tiled_loss(hidden, weight, labels, tile=tile)
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.mT, labels, ignore_index=IGNORE, reduction="none")
