"""What ranks are told to do: `results` to compare, `counts` against a formula, `times`, `held` bytes.

Each takes (group, setting, way), runs on every rank, and makes its models anew, from the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from gemma_policies.closed_form import Counts, formula
from gemma_policies.gemma import Setting, batch_of
from gemma_policies.run import Job, Run
from gemma_policies.ways import Way
from seqpar import Group
from seqpar.tensor_parallel.collectives import Collectives
from seqpar.testing import meet

STEPS = 3  # whose losses are compared: the second and third depend on gradients
JOBS: tuple[Job, ...] = ("generation", "LoRA step", "full step")


def results(group: Group, setting: Setting, way: Way) -> dict[str, Tensor]:
    """In float64: logits, tokens that are generated, losses of a few steps of both kinds of training."""
    small = replace(setting, batch=2, length=min(setting.length, 16))
    run = Run.of(group, small, way, "generation", torch.float64)
    found = {
        "logits": run.logits(batch_of(small)),
        "tokens": torch.tensor(list(islice(run.generate(run.cache()), min(setting.tokens, 16)))),
    }
    for job in ("LoRA step", "full step"):
        run = Run.of(group, small, way, job, torch.float64)
        losses = [run.step() for _ in range(STEPS)]
        found[f"losses, {job}"] = torch.tensor(losses, dtype=torch.float64)
    return found


def counts(group: Group, setting: Setting, way: Way) -> dict[Job, dict[str, Any]]:
    """By job, collectives and elements sent by this rank, and what the formula says."""
    found: dict[Job, dict[str, Any]] = {}
    for job in JOBS:
        run = Run.of(group, setting, way, job, torch.float32)
        forward, backward = Collectives(), Collectives()
        if job == "generation":
            tokens = run.generate(run.cache())
            next(tokens)
            with forward:
                next(tokens)
        else:
            with forward:
                loss = run.loss()
            with backward:
                loss.backward()
        sent = [c.sent() for c in (forward, backward)]
        expected = formula(setting, way, job, group.size)
        found[job] = {
            "calls": [dict(c.calls_by_kind()) for c in (forward, backward)],
            "counted": [_plain(x) for x in sent],
            "formula": [_plain(x) for x in expected],
            "is_formula": [dict(x) for x in sent] == list(expected),
        }
    return found


def times(group: Group, setting: Setting, way: Way, sweep: Iterable[int]) -> dict[str, float]:
    """Milliseconds on this rank, once: per 100 tokens, of steps, and forward of so many tokens."""
    found: dict[str, float] = {}
    for job in JOBS:
        run = Run.of(group, setting, way, job, torch.float32)
        if job != "generation":
            run.step()
            found[job] = _milliseconds(group, run.step)
            continue
        tokens = run.generate(run.cache())
        list(islice(tokens, 3))
        spent = _milliseconds(group, lambda tokens=tokens: list(islice(tokens, setting.tokens)))
        found[job] = 100 / setting.tokens * spent
        for num in sweep:
            ids = batch_of(replace(setting, length=num))[:1]
            run.logits(ids)
            found[f"forward {num}"] = _milliseconds(group, lambda ids=ids, run=run: run.logits(ids))
    return found


def held(group: Group, setting: Setting, way: Way) -> dict[str, int]:
    """Bytes of this rank in float32: weights, the cache of a token, gradients, what forward keeps."""
    run = Run.of(group, setting, way, "generation", torch.float32)
    found = {"weights": _bytes(run.model.parameters())}
    cache = run.cache()
    next(run.generate(cache))
    keys_values = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    found["KV of a token"] = _bytes(keys_values) // cache.get_seq_length()
    for job in ("LoRA step", "full step"):
        run = Run.of(group, setting, way, job, torch.float32)
        weights = {_local(p).untyped_storage().data_ptr() for p in run.model.parameters()}
        kept: list[Tensor] = []
        with saved_tensors_hooks(lambda x, kept=kept: (kept.append(x), x)[1], lambda x: x):
            loss = run.loss()
        kept = [x for x in kept if _local(x).untyped_storage().data_ptr() not in weights]
        found[f"kept, {job}"] = _bytes(kept)
        loss.backward()
        gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
        found[f"gradients, {job}"] = _bytes(gradients)
    return found


def _milliseconds(group: Group, do: Callable[[], object]) -> float:
    meet(group)
    start = time.perf_counter()
    do()
    return 1e3 * (time.perf_counter() - start)


def _plain(x: Counts) -> dict[str, float]:
    return {kind: float(elements) for kind, elements in x.items()}


def _local(x: Tensor) -> Tensor:
    x = x.to_local() if isinstance(x, DTensor) else x
    return x.trigger_wait() if isinstance(x, AsyncCollectiveTensor) else x


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all storages, each counted once."""
    storages = {(s := _local(x).untyped_storage()).data_ptr(): s.nbytes() for x in tensors}
    return sum(storages.values())
