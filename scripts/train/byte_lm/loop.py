"""`train`: the loop, the same for any number of ranks; threads, processes or one device."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

import seqpar
from byte_lm import checkpoint as checkpoints
from byte_lm.model import ByteLM
from byte_lm.ranks import Gradients, Ranks
from byte_lm.recipe import Recipe
from byte_lm.records import OnStep, StepRecord, peak_bytes
from byte_lm.text import batch_at, fingerprint, micro_batches
from seqpar import Group
from seqpar.comm import agreed
from seqpar.data import IGNORE


def train(
    group: Group,
    recipe: Recipe,
    text: UInt8[Tensor, "n"],
    *,
    checkpoint: Path | None = None,
    save_every: int = 0,
    resume: bool = False,
    fsdp: bool = False,
    on_step: OnStep | None = None,
) -> list[float]:
    """The loss of every step from the first, on every rank. All ranks must call.

    Runs on the device of `text`. A checkpoint is added to the folder `checkpoint` after the last step,
    and after every `save_every` steps unless that is 0. With `resume` every rank reads the newest one and
    continues; the losses are those of the uninterrupted run, and those before the checkpoint are among
    them. The ranks, and what `Recipe.fixed` leaves out, may be others than before.

    Args:
        fsdp: parameters, gradients and the optimizer's state are sharded over all processes.
        on_step: called on every rank with the record of each step that is run here.

    Raises:
        ValueError: the text is too short; there are not dp x sp ranks; there is no folder for the
            checkpoint, or it has one that is not to be resumed, is of another recipe or text, or has run
            more than `steps` steps.
        FileNotFoundError: there is no checkpoint to resume from.
        FloatingPointError: a loss or a gradient is not finite; the last checkpoint is kept.
        DesyncError: ranks differ in recipe, text or checkpoint, or another rank raised.
    """
    losses: list[float] = []
    path: Path | None = None
    with agreed(group, operation="train") as claim:
        fixed = recipe.fixed | {"text": fingerprint(text)}
        batch_at(text, recipe, 0)
        ranks = Ranks.of(group, recipe)
        gradients = Gradients.of(ranks, text.device.type, fsdp)
        if save_every < 0 or (checkpoint is None and (save_every or resume)):
            raise ValueError("save_every, not negative, and resume go with a checkpoint")
        if checkpoint and not checkpoint.is_dir():
            raise ValueError(f"there is no folder {checkpoint} for checkpoints")
        if checkpoint and not resume and checkpoints.steps(checkpoint):
            raise ValueError(f"{checkpoint} has checkpoints; resume, or take another folder")
        if checkpoint and resume:
            path, run = checkpoints.read_run(checkpoint, fixed, recipe.steps)
            losses = run["losses"]
        claim |= {"recipe": recipe, "text": fixed["text"], "losses": losses, "fsdp": fsdp}
        claim |= {"checkpoint": checkpoint is not None, "save_every": save_every}

    model = ByteLM(recipe, lambda: ranks.attention(recipe)).to(text.device)
    gradients.prepare(model, model.blocks)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=recipe.eps)
    if path is not None:
        with agreed(group, operation="resume"):
            checkpoints.load(path, model, optimizer)
    for step in range(len(losses), recipe.steps):
        started = time.perf_counter()
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / max(1, recipe.warmup))
        loss, norm = _step(model, optimizer, gradients, recipe, batch_at(text, recipe, step))
        seconds = time.perf_counter() - started
        losses.append(loss)
        done = step + 1
        if checkpoint and (done == recipe.steps or (save_every and done % save_every == 0)):
            state = {"step": done, "fixed": fixed, "losses": losses}
            checkpoints.save(checkpoint, model, optimizer, state, group)
        if on_step:
            rate = recipe.batch * recipe.length / seconds
            peak = peak_bytes(group, text.device)
            on_step(StepRecord(step, loss, norm, seconds, rate, peak))
    return losses


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradients: Gradients,
    recipe: Recipe,
    batch: dict[str, Tensor],
) -> tuple[float, float]:
    """(loss, norm of the gradient) of one step over the whole batch, the same on every rank."""
    ranks, device = gradients.ranks, batch["labels"].device
    parts = micro_batches(batch, recipe, ranks.replica)
    shards = [seqpar.shard_batch(part, ranks.sharers, recipe.layout) for part in parts]
    valid = [shard["labels"] != IGNORE for shard, _ in shards]
    num_tokens = seqpar.count_tokens(valid, ranks.everyone)
    optimizer.zero_grad()
    loss = 0.0
    with gradients.step(model):
        for (shard, layout), counts in zip(shards, valid, strict=True):
            with _autocast(device, recipe.autocast):
                losses = model(shard["input_ids"], shard["labels"], shard["position_ids"], layout)
            mean = seqpar.mean_loss(
                losses,
                ranks.everyone,
                valid=counts,
                num_tokens=num_tokens,
                gradients=gradients.combined,
            )
            loss += mean.item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"a loss is {loss}; try a lower lr")
            mean.backward()
    params: list[Any] = [p for p in model.parameters() if p.grad is not None]
    norm: Any = nn.utils.clip_grad_norm_(params, recipe.clip or math.inf)
    size = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(size):  # a step would ruin the weights, and the next checkpoint with them
        raise FloatingPointError(f"the norm of a gradient is {size}; try a lower lr")
    optimizer.step()
    return loss, size


def _autocast(device: torch.device, name: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16")
