"""Continues a text with the byte-level language model of `byte_level.py`, its keys and values sharded.

The prompt is sharded like a training sequence and each rank keeps the keys and values it made. Every
new byte is then computed on all ranks, with one small exchange in each layer. Bytes are chosen greedily.
Without a checkpoint the weights are those before training.

Example: torchrun --nproc-per-node 2 scripts/train/generate.py --checkpoint runs/a --prompt "def main("
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from byte_lm import checkpoint as checkpoints
from byte_lm.model import ByteLM
from byte_lm.ranks import Ranks
from byte_lm.recipe import ATTENTIONS, GRIDS, Recipe
from byte_lm.start import start
from jaxtyping import Float, Int
from torch import Tensor, nn

import seqpar
from seqpar import Group, KVCache, Layout
from seqpar.comm import agreed
from seqpar.commands.arguments import parser_of
from seqpar.layout import LAYOUTS

STRATEGIES = [name for name in ATTENTIONS if name not in GRIDS]


class CachedAttention(nn.Module):
    """Attention whose first call fills a cache with its rows, and whose later calls continue it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.cache: KVCache | None = None

    def forward(
        self,
        q: Float[Tensor, "b t hq d"],
        k: Float[Tensor, "b t hkv d"],
        v: Float[Tensor, "b t hkv vd"],
        layout: Layout,
    ) -> Float[Tensor, "b t hq vd"]:
        """This rank's rows of the prompt; later on, of the new tokens, all rows on every rank."""
        if self.cache is not None:
            return self.cache.step(q, k, v)
        of = self.attention
        self.cache = KVCache(of.group, layout, k, v, mask=of.mask, score=of.score)
        out: Tensor = of(q, k, v, layout)
        return out


@torch.no_grad()
def generate(
    group: Group, model: ByteLM, prompt: Int[Tensor, "b s"], num_tokens: int, layout: str = "zigzag"
) -> Int[Tensor, "b n"]:
    """The most likely next bytes, the same on every rank. All ranks must call.

    Raises:
        ValueError: the prompt is empty.
        DesyncError: ranks differ in the prompt, or in what they chose.
    """
    with agreed(group, operation="generate") as claim:
        if prompt.shape[1] == 0:
            raise ValueError("a prompt has at least one byte")
        claim |= {"prompt": prompt.tolist(), "num_tokens": num_tokens, "layout": layout}
    attentions = [block.attention for block in model.blocks]
    for block in model.blocks:
        block.attention = CachedAttention(block.attention)
    # The last byte of the prompt is the first step, so that its logits are on every rank.
    length = prompt.shape[1] - 1
    shards = LAYOUTS[layout](length, group.size)
    positions = shards.positions(group.rank).to(prompt.device)
    model.logits(prompt[:, positions], positions.expand(len(prompt), -1), shards)
    chosen = [prompt[:, -1:]]
    for n in range(num_tokens):
        logits = model.logits(chosen[-1], torch.full_like(chosen[-1], length + n), shards)
        chosen.append(logits.argmax(-1))
        with agreed(group, operation="the chosen bytes") as claim:
            claim["bytes"] = chosen[-1].tolist()
    for block, attention in zip(model.blocks, attentions, strict=True):
        block.attention = attention
    return torch.cat(chosen, dim=1)[:, 1:]


def load(group: Group, folder: Path | None, strategy: str) -> ByteLM:
    """The model of the newest checkpoint in a folder of `byte_level.py`, or of its defaults before training.

    Raises:
        ValueError: it is no such checkpoint.
        OSError: there is none, or it cannot be read.
    """
    if folder is None:
        return make(group, Recipe(strategy=strategy))
    path, run = checkpoints.newest(folder)
    there = {name: value for name, value in run["fixed"].items() if name != "text"}
    model = make(group, Recipe(**there, strategy=strategy))
    checkpoints.load_model(path, model)
    return model


def make(group: Group, recipe: Recipe) -> ByteLM:
    """The model of a recipe, before training."""
    ranks = Ranks.of(group, recipe)
    return ByteLM(recipe, lambda: ranks.attention(recipe))


def run(args: argparse.Namespace, group: Group, device: torch.device) -> None:
    """Generates, and on rank 0 prints the text."""
    with agreed(group, operation="load"):
        model = load(group, args.checkpoint, args.strategy).to(device)
    prompt = torch.tensor([list(args.prompt.encode())], dtype=torch.long, device=device)
    start = time.perf_counter()
    new = generate(group, model, prompt, args.tokens, args.layout)
    seconds = time.perf_counter() - start
    if group.rank > 0:
        return
    text = bytes(new[0].tolist()).decode(errors="replace")
    print(args.prompt + text)
    if args.json:
        result = {"ranks": group.size, "bytes": new[0].tolist(), "text": text, "seconds": seconds}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Parses arguments and generates; fails when they are wrong or ranks differ."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of byte_level.py; every rank reads it"
    )
    parser.add_argument("--prompt", default="import ", help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="how many bytes (default: 64)")
    parser.add_argument("--strategy", default="ring", choices=STRATEGIES, help="of the prompt")
    parser.add_argument("--layout", default="zigzag", choices=LAYOUTS, help="of the prompt")
    parser.add_argument("--json", type=Path, help="write bytes and seconds here")
    args = parser.parse_args()
    try:
        if args.tokens < 0:
            raise ValueError(f"tokens must not be negative, got {args.tokens}")
        run(args, *start())
    except (ValueError, OSError, seqpar.DesyncError) as error:
        # The frames hold the group; while it lives, gloo's threads do, and may abort Python's exit.
        traceback.clear_frames(error.__traceback__)
        raise SystemExit(f"error: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
