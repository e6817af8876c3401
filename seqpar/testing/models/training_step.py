"""A training step of a model, on one device and on this rank of a group, as numbers to compare."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import seqpar
from seqpar.data import Labels
from seqpar.integrations.transformers import SequenceParallel

DENSE = "dense_float64"


@dataclass(frozen=True)
class Step:
    """What a step computed: logits of the whole batch, the loss, the gradient of every parameter."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """Attention on one device, under transformers' own mask, in the type of q.

    Eager attention takes its softmax in float32 and torch's function knows neither softcap nor sinks, so
    neither can judge in float64. Rows that see nothing get zeros.
    """
    ratio = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(ratio, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None:  # of a tower, whose images see all of themselves
        assert not module.is_causal
        attention_mask = scores.new_ones((), dtype=torch.bool)
    elif attention_mask.is_floating_point():  # what models that make their own add to scores
        scores, attention_mask = scores + attention_mask, scores.new_ones((), dtype=torch.bool)
    seen = attention_mask.expand_as(scores)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]] * seen.any(-1, keepdim=True)
    return (weights @ value).transpose(1, 2).contiguous(), None


def dense_mask(**arguments: Any) -> Tensor:
    """The mask that transformers makes, never left out."""
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(**(arguments | skips))
    assert mask is not None
    return mask


AttentionInterface.register(DENSE, dense_attention)
AttentionMaskInterface.register(DENSE, dense_mask)


def one_device(
    model: Any, batch: Mapping[str, Any], labels: Labels, attention: str = DENSE
) -> Step:
    """The step on one device; the model is copied.

    Without a cache: with one, which they make by themselves, models do not look for packed texts.
    """
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    given = {name: x for name, x in batch.items() if name != "labels"}
    given |= {"use_cache": False} if labels == "next" else {}
    logits = model(**given).logits
    rows, targets = logits, batch["labels"]
    if labels == "next":
        rows, targets = logits[:, :-1], targets[:, 1:]
    wide = rows.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, targets.flatten(), ignore_index=-100)
    loss.backward()
    return Step(logits.detach(), loss.detach(), gradients_of(model))


def on_rank(
    group: seqpar.Group,
    model: Any,
    batch: Mapping[str, Any],
    strategy: str = "ring",
    **options: Any,
) -> Step:
    """The step on this rank; the model is copied. Logits are gathered, gradients summed."""
    model = copy.deepcopy(model)
    sp = SequenceParallel(model, attend_by(strategy, group))
    calls: list[tuple[seqpar.Layout, Tensor]] = []

    def note(_: nn.Module, __: Any, given: dict[str, Any], output: Any) -> None:
        calls.append((given["seqpar"].plan.layout, output.logits.detach()))

    model.register_forward_hook(note, with_kwargs=True)
    loss = sp.loss(batch, **options)
    loss.backward()
    seqpar.sum_gradients(model.parameters(), group)
    layout, logits = calls[0]
    logits = seqpar.unshard_sequence(logits, layout, group)
    return Step(logits, loss.detach(), gradients_of(model))


def attend_by(strategy: str, group: seqpar.Group) -> Any:
    """The module of a strategy; a grid has two Ulysses ranks where the group is even."""
    if strategy in ("hybrid", "mesh"):
        grid = group.grid(ulysses=2 - group.size % 2)
        kinds = {"hybrid": seqpar.HybridAttention, "mesh": seqpar.MeshAttention}
        return kinds[strategy](grid)
    kinds = {
        "ring": seqpar.RingAttention,
        "ulysses": seqpar.UlyssesAttention,
        "allgather": seqpar.AllGatherAttention,
    }
    return kinds[strategy](group)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, by name.

    Raises:
        AssertionError: one outside of a tower has none, or every one is zero.
    """
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: grad for name, grad in found.items() if grad is not None}
    missing = [name for name in found.keys() - gradients.keys() if not _may_be_unused(name)]
    assert not missing, f"no gradient: {missing}"
    assert any(bool(grad.any()) for grad in gradients.values())
    return gradients


def _may_be_unused(name: str) -> bool:
    """Whether it is in a tower, of which some models leave the last layers out, or text has none."""
    parts = ("vision", "visual", "projector", "connector", "cross_attn")
    return any(part in name for part in parts)


def differences(
    got: Step, want: Step, float32: tuple[str, ...] = (), counted: Tensor | None = None
) -> dict[str, float]:
    """The largest difference of logits and loss and of gradients, over the largest value if above 1.

    Args:
        float32: parts of the names of parameters that are reported as "float32" apart from the others.
        counted: `[b s]`, the rows whose logits mean something.
    """
    pairs = {"logits": (got.logits, want.logits), "loss": (got.loss, want.loss)}
    if counted is not None:
        pairs["logits"] = (got.logits[counted], want.logits[counted])
    off = {name: _off(*pair) for name, pair in pairs.items()} | {"gradients": 0.0, "float32": 0.0}
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in got.gradients.items():
        kind = "float32" if any(part in name for part in float32) else "gradients"
        off[kind] = max(off[kind], _off(gradient, want.gradients[name]))
    return off


def _off(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape, (x.shape, y.shape)
    worst = (x.double() - y.double()).abs().max() / max(1.0, float(y.abs().max()))
    return float(worst)
