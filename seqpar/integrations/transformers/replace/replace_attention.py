"""`replace_attention`: the attention of a transformers model over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.comm import Group, agreed, all_gather
from seqpar.integrations.transformers.attention.registration import NAME, register
from seqpar.integrations.transformers.attention.replacement import Handover, handover_of
from seqpar.integrations.transformers.internals import attention_name
from seqpar.integrations.transformers.probe.before import Before, run_before
from seqpar.integrations.transformers.probe.compare import same_rows
from seqpar.integrations.transformers.probe.config import check_config, inner_model, text_stack
from seqpar.integrations.transformers.probe.tokens import WHOLE
from seqpar.integrations.transformers.probe.trial import run_after, switch
from seqpar.integrations.transformers.replace.original import Original, layouts, originals_of
from seqpar.integrations.transformers.replace.replaced import ReplacedAttention, ReplacedModel
from seqpar.replicas import same_weights

COMPARED = 4096  # values of a model's output that ranks compare


def replace_attention(model: nn.Module, tp: Group | None = None) -> ReplacedModel:
    """Puts this package's attention in the place of a transformers model's own. All ranks must call.

    The heads of every layer are shared by the ranks of `tp`; all else stays whole on each of them. Each rank
    gives its own model, of the same weights. The model then attends by the plan of a call:
    `SequenceParallel(model, seqpar.RingAttention(sp))`, where `sp` are the ranks that share the sequence.

    It is run here on a few tokens as it was and as it is now. If a layer or the model returns something else,
    everything is put back, and every rank is told.

    The originals' weights are given up: the model's parameters are others then, so make optimizers later.

    ALiBi is a straight line at every distance. Falcon rounds its own to the 8 bits of bfloat16: a staircase
    round that line, beyond 256 positions or, where the number of heads is no power of two, from the first.

    Args:
        model: with its weights, whole on every rank; it may be wrapped.
        tp: the ranks that share the heads; by default this one alone.

    Raises:
        NotImplementedError: an attention class is not known, or the model asks for what is not honoured, or
            does not return the same.
        ValueError: heads cannot be dealt to the ranks, weights are not loaded, or gradients would be lost.
        RuntimeError: its attention was replaced before, or it is set up to attend over ranks.
        DesyncError: ranks of tp differ in their model, or another rank raised one of the above.
    """
    tp = Group.alone() if tp is None else tp
    with agreed(tp, operation="replace_attention") as claim:
        inner = inner_model(model)
        check_config(model, inner)
        if text_stack(inner) is not inner:
            parts = sorted(inner.config.sub_configs)
            raise NotImplementedError(
                f"{type(inner).__name__} is made of {parts}; replace the attention of its text model, set up "
                "by itself"
            )
        if handover_of(model) is not None or attention_name(inner.config) == NAME:
            raise RuntimeError(
                f"{type(inner).__name__} attends over ranks already; restore() or switch it back first"
            )
        originals = originals_of(model, inner)
        switches = {original.family.switches for original in originals}
        handover = Handover(tp, switches=switches == {True})
        for original in originals:  # that its heads can be dealt
            ReplacedAttention(original, handover, device="meta")
        claim |= {"model": type(inner).__name__, **dict(layouts(originals))}
        register()
    with agreed(tp, operation="replace_attention: as it was") as claim:
        with _noted([original.module for original in originals], sequence=0) as own:
            before = run_before(inner, attention_name(inner.config))
        claim |= {n: (tuple(x.shape), x.dtype) for n, x in before.outputs.items()}
    _check_ranks(tp, inner, before)
    replaced = ReplacedModel(model, inner, handover, originals, attention=before.attention)
    try:
        replaced.replace()
        with agreed(tp, operation="replace_attention: trying out"):
            switch(inner, handover)
            with _noted(replaced.replacements, sequence=WHOLE) as ours:
                findings = run_after(inner, before, across=tp)
            _check_layers(originals, own, ours)
        handover.findings = replace(findings, numbers={})
    except BaseException:
        if replaced.replacements:
            replaced.restore()
        raise
    return replaced


@contextmanager
def _noted(modules: Iterable[nn.Module], *, sequence: int) -> Iterator[list[Tensor]]:
    """The rows of one sequence that each module returns when it is first called, in order of the modules."""
    noted: dict[nn.Module, Tensor] = {}
    rows: list[Tensor] = []

    def note(module: nn.Module, _: object, output: Any) -> None:
        noted.setdefault(module, output[0].detach())

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()
    rows.extend(noted[module][sequence] for module in modules)


def _check_layers(originals: list[Original], own: list[Tensor], ours: list[Tensor]) -> None:
    """Refuses layers that return something else than their originals did."""
    for original, x, y in zip(originals, own, ours, strict=True):
        if not same_rows(x, y):
            raise NotImplementedError(
                f"{original.path} ({type(original.module).__name__}) returns other rows than what would "
                f"stand in for it, off by {float((x - y).abs().max()):.2g}: its model was changed, or asks "
                "for what is not known to replace_attention"
            )


def _check_ranks(tp: Group, inner: nn.Module, before: Before) -> None:
    """Refuses ranks whose models have other weights."""
    rows = [x.flatten(1) for x in before.outputs.values()]
    mine = torch.cat(rows, 1)[:, :COMPARED].contiguous()
    everyone = all_gather(mine, tp, [len(mine)] * tp.size, 0).chunk(tp.size)
    with agreed(tp, operation="replace_attention: weights"):
        for rank, theirs in enumerate(everyone):
            if not same_rows(mine, theirs):
                raise ValueError(
                    f"{type(inner).__name__} returns something else on rank {rank} than on rank {tp.rank}; "
                    "every rank needs the same weights"
                )
    # Small differences do not show in a few rows, and copies of kv heads must be the same bits.
    same_weights(inner, tp)
