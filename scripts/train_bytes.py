"""Trains a byte-level language model on sequences that are sharded over any number of ranks.

The text is the source of Python's standard library, or any files. Losses depend on the recipe and
the text, not on how many ranks share a sequence, so a run may be resumed with more or fewer ranks.
Without a launcher there is one rank. On a machine with GPUs every rank needs one of its own, unless
they are hidden with CUDA_VISIBLE_DEVICES= to train on the CPU.

Example: torchrun --nproc-per-node 2 scripts/train_bytes.py --strategy ring --json out.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import seqpar
from seqpar import Group, Layout
from seqpar.comm import agreed
from seqpar.data import IGNORE
from seqpar.layout import LAYOUTS

ATTENTIONS = {"ring": seqpar.RingAttention, "ulysses": seqpar.UlyssesAttention}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
NO_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # folders left out


def _option(default: Any, meaning: str, choices: Iterable[str] = ()) -> Any:
    return field(default=default, metadata={"help": meaning, "choices": tuple(choices) or None})


@dataclass(frozen=True)
class Recipe:
    """Everything that losses depend on, but for the text.

    Raises:
        ValueError: a value is out of range, or values do not fit together.
    """

    strategy: str = _option("ring", "how ranks share attention", ATTENTIONS)
    layout: str = _option("zigzag", "which rank holds which positions", LAYOUTS)
    dtype: str = _option("float32", "of parameters and activations", DTYPES)
    steps: int = _option(50, "in all, those before --resume included")
    length: int = _option(1024, "bytes of a sequence")
    batch: int = _option(2, "sequences of a step")
    dim: int = _option(128, "model width")
    layers: int = _option(2, "number of blocks")
    heads: int = _option(4, "query heads")
    kv_heads: int = _option(2, "key/value heads, of which heads is a multiple")
    lr: float = _option(1e-3, "learning rate after the warmup, constant from there")
    warmup: int = _option(10, "steps until then, linear")
    eps: float = _option(1e-6, "of AdamW; the smaller, the more rounding of small gradients shows")
    seed: int = _option(0, "of parameters and batches")

    def __post_init__(self) -> None:
        least = {"length": 2, "lr": 0, "warmup": 0, "eps": 0, "seed": 0}
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {choices}, got {value!r}")
            if not choices and not (minimum := least.get(f.name, 1)) <= value < math.inf:
                raise ValueError(f"{f.name} must be finite and at least {minimum}, got {value}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim={self.dim} must be a multiple of 2 * heads={2 * self.heads}")


def standard_library() -> list[Path]:
    """The sources of the Python that is running, sorted, without installed packages and tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if NO_TEXT.isdisjoint(p.relative_to(root).parts))


def load_text(paths: Iterable[Path], max_bytes: int) -> UInt8[Tensor, "n"]:
    """The first `max_bytes` bytes of the files, one after another; ValueError if there are none."""
    text = bytearray()
    for path in paths:
        text += path.read_bytes()
        if len(text) >= max_bytes:
            break
    if max_bytes < 1 or not text:
        raise ValueError(f"there is no text in the first {max_bytes} bytes of the files")
    return torch.frombuffer(text, dtype=torch.uint8)[:max_bytes]


def batch_at(text: UInt8[Tensor, "n"], recipe: Recipe, step: int) -> dict[str, Tensor]:
    """The whole batch of a step, drawn from (seed, step) alone.

    Raises:
        ValueError: the text is not longer than a sequence.
    """
    if len(text) <= recipe.length:
        raise ValueError(f"text must be longer than length={recipe.length}, got {len(text)} bytes")
    draw = random.Random(f"{recipe.seed} {step}")
    starts = [draw.randrange(len(text) - recipe.length + 1) for _ in range(recipe.batch)]
    rows = torch.stack([text[start : start + recipe.length] for start in starts]).long()
    return {"input_ids": rows, "labels": rows}


class Block(nn.Module):
    """Attention with grouped heads and rotary positions, then an MLP, each added to its input."""

    def __init__(self, recipe: Recipe, group: Group) -> None:
        super().__init__()
        e, d = recipe.dim, recipe.dim // recipe.heads
        self.head_width, self.norm = d, nn.RMSNorm(e, eps=1e-5)
        self.q, self.out = nn.Linear(e, e, bias=False), nn.Linear(e, e, bias=False)
        self.k, self.v = (nn.Linear(e, recipe.kv_heads * d, bias=False) for _ in range(2))
        self.attention = ATTENTIONS[recipe.strategy](group, mask=seqpar.Mask(causal=True))
        up, down = nn.Linear(e, 4 * e, bias=False), nn.Linear(4 * e, e, bias=False)
        self.mlp = nn.Sequential(nn.RMSNorm(e, eps=1e-5), up, nn.GELU(), down)

    def forward(
        self, x: Float[Tensor, "b sl e"], position_ids: Int[Tensor, "b sl"], layout: Layout
    ) -> Float[Tensor, "b sl e"]:
        """The rows that this rank holds, after the block. All ranks must call."""
        y = self.norm(x)
        q, k, v = (f(y).unflatten(2, (-1, self.head_width)) for f in (self.q, self.k, self.v))
        q, k = rotate(q, position_ids), rotate(k, position_ids)
        x = x + self.out(self.attention(q, k, v, layout).flatten(2))
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
    """A causal transformer over bytes, replicated: equal recipes start with equal weights."""

    def __init__(self, recipe: Recipe, group: Group) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, recipe.dim)
        self.blocks = nn.ModuleList(Block(recipe, group) for _ in range(recipe.layers))
        self.norm = nn.RMSNorm(recipe.dim, eps=1e-5)
        self.head = nn.Linear(recipe.dim, 256, bias=False)
        # A generator of its own: simulated ranks are threads, which share torch's global one.
        generator = torch.Generator().manual_seed(recipe.seed)
        # Attention counts from the first step, so that wrong attention shows in the first losses.
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 1.0 if name == "embedding.weight" else p.shape[1] ** -0.5
                nn.init.normal_(p, std=std, generator=generator)
        self.to(DTYPES[recipe.dtype])

    def forward(
        self, input_ids: Int[Tensor, "b sl"], position_ids: Int[Tensor, "b sl"], layout: Layout
    ) -> Float[Tensor, "b sl 256"]:
        """The logits of the rows that this rank holds. All ranks must call."""
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, position_ids, layout)
        logits: Tensor = self.head(self.norm(x))
        return logits


def train(
    group: Group,
    recipe: Recipe,
    text: UInt8[Tensor, "n"],
    *,
    checkpoint: Path | None = None,
    save_every: int = 0,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """The loss of every step from the first, on every rank. All ranks must call.

    Runs on the device of `text`. Rank 0 replaces `checkpoint` after the last step, and after every
    `save_every` steps unless that is 0. With `resume` every rank reads it and continues; the losses
    are those of the uninterrupted run, and those before the checkpoint are among them. `on_step` is
    called on every rank with the number of each step that is run here, from 0, and its loss.

    Raises:
        ValueError: the text is too short, there is no folder for the checkpoint, or it belongs to
            another recipe (but for `steps`) or text, or has run more than `steps` steps.
        FileNotFoundError: there is no checkpoint to resume from.
        FloatingPointError: a loss is not finite; the last checkpoint is kept.
        DesyncError: ranks differ in recipe, text or checkpoint, or another rank raised.
    """
    # What may not change on the way, steps excepted; the text as its length and a checksum.
    checksum = (text * torch.arange(1, len(text) + 1, device=text.device)).sum()
    settings = asdict(recipe) | {"text": [len(text), int(checksum)]}
    state: dict[str, Any] = {}
    with agreed(group, "train") as claim:
        batch_at(text, recipe, 0)
        if save_every < 0 or (checkpoint is None and (save_every or resume)):
            raise ValueError("save_every, not negative, and resume go with a checkpoint")
        if checkpoint and not checkpoint.parent.is_dir():
            raise ValueError(f"there is no folder {checkpoint.parent} for the checkpoint")
        if checkpoint and resume:
            state = _load(checkpoint, settings)
        losses: list[float] = list(state.get("losses", ()))
        saving = {"checkpoint": checkpoint is not None, "save_every": save_every, "losses": losses}
        claim |= settings | saving

    model = ByteLM(recipe, group).to(text.device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=recipe.eps)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(len(losses), recipe.steps):
        loss = _loss(model, group, recipe, batch_at(text, recipe, step))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {step} is {losses[-1]}; try a lower lr")
        optimizer.zero_grad()
        loss.backward()
        seqpar.sum_gradients(model.parameters(), group)
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / max(1, recipe.warmup))
        optimizer.step()
        done = step + 1
        if checkpoint and (done == recipe.steps or (save_every and done % save_every == 0)):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            _save(state | {"step": done, "recipe": settings, "losses": losses}, checkpoint, group)
        if on_step:
            on_step(step, losses[-1])
    return losses


def _loss(
    model: ByteLM, group: Group, recipe: Recipe, batch: dict[str, Tensor]
) -> Float[Tensor, ""]:
    """The mean over the whole batch, the same on every rank."""
    shard, layout = seqpar.shard_batch(batch, group, recipe.layout)
    logits = model(shard["input_ids"], shard["position_ids"], layout).flatten(0, 1)
    labels = shard["labels"].flatten()
    token_losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return seqpar.mean_loss(token_losses, group, valid=labels != IGNORE)


def _save(state: dict[str, Any], checkpoint: Path, group: Group) -> None:
    """Rank 0 replaces the checkpoint at once; all return when it is there, or raise."""
    with agreed(group, "save") as claim:
        claim["step"] = state["step"]
        if group.rank == 0:
            partial = checkpoint.with_name(f"{checkpoint.name}.partial")
            torch.save(state, partial)
            os.replace(partial, checkpoint)


def _load(checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state in the checkpoint, on the CPU; errors as in `train`."""
    if not checkpoint.is_file():
        raise FileNotFoundError(f"there is no checkpoint {checkpoint} to resume from")
    try:
        state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        there, step = state["recipe"], state["step"]
    except Exception as error:  # a file of another kind fails in many ways
        raise ValueError(f"{checkpoint} is no checkpoint of this script") from error
    names = [n for n in there | settings if n != "steps" and there.get(n) != settings.get(n)]
    if names:
        differences = [f"{n} is {there.get(n)!r} there and {settings.get(n)!r} here" for n in names]
        raise ValueError(f"{checkpoint} is of another run: {'; '.join(differences)}")
    if step > settings["steps"]:
        raise ValueError(f"{checkpoint} has run {step} steps, more than steps={settings['steps']}")
    return state


def run(args: argparse.Namespace, group: Group, recipe: Recipe, text: Tensor) -> None:
    """Trains, and on rank 0 shows progress and writes the results."""
    times: list[float] = []
    # No refreshing thread: it would compete with the ranks for the cores.
    console = Console(stderr=True)
    with Progress(console=console, auto_refresh=False, disable=group.rank > 0) as bar:
        task = bar.add_task("loss", total=recipe.steps)

        def on_step(step: int, loss: float) -> None:
            times.append(time.perf_counter())
            bar.update(task, completed=step + 1, description=f"loss {loss:.4f}", refresh=True)

        saving = {name: getattr(args, name) for name in ("checkpoint", "save_every", "resume")}
        losses = train(group, recipe, text, **saving, on_step=on_step)
    if group.rank > 0:
        return
    # The first step here is not in the rate: it warms up.
    num_tokens = recipe.batch * recipe.length * (len(times) - 1)
    rate = num_tokens / (times[-1] - times[0]) if len(times) > 1 else None
    speed = f"{rate:.0f} tokens/s" if rate else "too few steps to time"
    print(f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}, P={group.size}, {speed}")
    if args.json:
        result = {"losses": losses, "ranks": group.size, "strategy": recipe.strategy}
        result |= {"layout": recipe.layout, "recipe": asdict(recipe), "tokens_per_second": rate}
        args.json.write_text(json.dumps(result, indent=1))


def main() -> None:
    """Parses arguments and trains; fails when they are wrong or the loss is not finite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in fields(Recipe):
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default,
            choices=f.metadata["choices"], help=f"{f.metadata['help']} (default: {f.default})",
        )  # fmt: skip
    parser.add_argument("--data", type=Path, nargs="+", help="files instead of Python's sources")
    parser.add_argument("--max-bytes", type=int, default=2_000_000, help="of text (default: 2 MB)")
    shared = "written by rank 0 and read by every rank, so all must see the same file system"
    parser.add_argument("--checkpoint", type=Path, help=shared)
    parser.add_argument("--save-every", type=int, default=0, help="steps (default: the last only)")
    parser.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    parser.add_argument("--json", type=Path, help="write losses, recipe and speed here")
    args = parser.parse_args()
    has_launcher, device = "RANK" in os.environ, "cuda" if torch.cuda.is_available() else "cpu"
    try:
        recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
        if args.json and not args.json.parent.is_dir():
            raise ValueError(f"there is no folder {args.json.parent} for --json")
        text = load_text(args.data or standard_library(), args.max_bytes).to(device)
        if has_launcher and device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if has_launcher:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        run(args, Group.of() if has_launcher else Group.alone(), recipe, text)
    except (ValueError, OSError, FloatingPointError, seqpar.DesyncError) as error:
        # The frames hold the group; while it lives, gloo's threads do, and may abort Python's exit.
        traceback.clear_frames(error.__traceback__)
        raise SystemExit(f"error: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
