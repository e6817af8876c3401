"""Distributed checkpoints that any number of ranks can resume, and that a crash cannot destroy.

A checkpoint is a folder `step-N` with the tensors as torch.distributed.checkpoint writes them and a
`run.json`. It is written as `step-N.partial` and renamed when complete; only then are older ones removed.
What bears the name `step-N` is complete, whenever a run is killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from byte_lm.safe_reader import SafePlanner, SafeReader
from seqpar import Group
from seqpar.comm import agreed

NAME = re.compile(r"step-(\d+)")


def steps(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder, by their steps."""
    return {int(m[1]): p for p in folder.glob("step-*") if (m := NAME.fullmatch(p.name))}


def newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint in a folder, and what it says of its run.

    Raises:
        ValueError: it is none of this script.
        FileNotFoundError: there is no checkpoint.
    """
    complete = steps(folder)
    if not complete:
        raise FileNotFoundError(f"there is no checkpoint in {folder} to resume from")
    path = complete[max(complete)]
    try:
        run: dict[str, Any] = json.loads((path / "run.json").read_text())
        _ = run["fixed"], run["step"], run["losses"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of this script") from error
    return path, run


def read_run(folder: Path, fixed: dict[str, Any], most_steps: int) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint in a folder, and its step and losses.

    Args:
        fixed: what the run must have in common with the one that saved it.
        most_steps: how many this run may have.

    Raises:
        ValueError: the checkpoint is of another run, has run more steps, or is none of this script.
        FileNotFoundError: there is no checkpoint.
    """
    path, run = newest(folder)
    there, step = run["fixed"], run["step"]
    names = [n for n in there | fixed if there.get(n) != fixed.get(n)]
    if names:
        differences = [f"{n} is {there.get(n)!r} there and {fixed.get(n)!r} here" for n in names]
        raise ValueError(f"{path} is of another run: {'; '.join(differences)}")
    if step > most_steps:
        raise ValueError(f"{path} has run {step} steps, more than steps={most_steps}")
    return path, run


def save(
    folder: Path, model: nn.Module, optimizer: Optimizer, run: dict[str, Any], group: Group
) -> None:
    """Adds the checkpoint of `run["step"]`, then removes the older ones. All ranks call.

    All return when it is there. Replicated parameters are written by rank 0, sharded ones by each rank.

    Raises:
        DesyncError: ranks differ in the step, or another rank raised.
        OSError: it cannot be written; the last checkpoint is kept.
    """
    path = folder / f"step-{run['step']:06}"
    partial = path.with_name(f"{path.name}.partial")
    is_sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    with agreed(group, operation="save: begin") as claim:
        claim |= {"step": run["step"], "is_sharded": is_sharded}
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with agreed(group, operation="save: write"):
        if is_sharded or group.rank == 0:
            with _as_os_error(partial):
                dcp.save(_state(model, optimizer), checkpoint_id=partial, no_dist=not is_sharded)
    with agreed(group, operation="save: rename"):
        if group.rank == 0:
            with (partial / "run.json").open("w") as file:
                json.dump(run, file)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            for step, other in steps(folder).items():
                if step < run["step"]:
                    shutil.rmtree(other)


def load(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Restores parameters and the optimizer's state, however many ranks have saved them.

    Every rank reads what it holds, by itself. Nothing that the checkpoint says is run.

    Raises:
        OSError: the checkpoint cannot be read, or holds more than numbers and tensors.
    """
    state = _state(model, optimizer)
    _read(path, state)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def load_model(path: Path, model: nn.Module) -> None:
    """Restores parameters alone, such as to generate. Nothing that the checkpoint says is run.

    Raises:
        OSError: the checkpoint cannot be read, or holds more than numbers and tensors.
    """
    state = {"model": get_model_state_dict(model)}
    _read(path, state)
    set_model_state_dict(model, state["model"])


def _read(path: Path, state: dict[str, Any]) -> None:
    with _as_os_error(path):
        dcp.load(state, storage_reader=SafeReader(path), planner=SafePlanner(), no_dist=True)


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """A CheckpointException is no Exception, so that nobody would tell the other ranks of it."""
    try:
        yield
    except dcp.CheckpointException as error:
        raise OSError(f"{path} cannot be written or read: {error}") from error


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """By the names of parameters, so that it does not depend on the ranks."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
