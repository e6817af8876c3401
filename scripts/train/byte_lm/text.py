"""Text as bytes, and the batch of a step: drawn from (seed, step), so that any run can be resumed."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from byte_lm.recipe import Recipe

NO_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}  # folders left out


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


def fingerprint(text: UInt8[Tensor, "n"]) -> list[int]:
    """The length of a text and a checksum."""
    checksum = (text * torch.arange(1, len(text) + 1, device=text.device)).sum()
    return [len(text), int(checksum)]


def batch_at(text: UInt8[Tensor, "n"], recipe: Recipe, step: int) -> dict[str, Tensor]:
    """The whole batch of a step, of all replicas and micro-batches, drawn from (seed, step) alone.

    Raises:
        ValueError: the text is not longer than a sequence.
    """
    if len(text) <= recipe.length:
        raise ValueError(f"text must be longer than length={recipe.length}, got {len(text)} bytes")
    draw = random.Random(f"{recipe.seed} {step}")
    starts = [draw.randrange(len(text) - recipe.length + 1) for _ in range(recipe.batch)]
    rows = torch.stack([text[start : start + recipe.length] for start in starts]).long()
    return {"input_ids": rows, "labels": rows}


def micro_batches(
    batch: dict[str, Tensor], recipe: Recipe, replica: int
) -> list[dict[str, Tensor]]:
    """What a replica trains on: every `dp`-th sequence, in `accumulate` parts of one size."""
    mine = {name: x[replica :: recipe.dp].chunk(recipe.accumulate) for name, x in batch.items()}
    return [dict(zip(mine, part, strict=True)) for part in zip(*mine.values(), strict=True)]
