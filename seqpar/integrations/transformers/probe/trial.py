"""What is found out about a model before it is sharded, by running it on a few tokens."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar.comm import Group, agreed
from seqpar.integrations.transformers.attention.call import Call
from seqpar.integrations.transformers.attention.patterns import as_bytes
from seqpar.integrations.transformers.attention.registration import NAME, MissingPlanError
from seqpar.integrations.transformers.attention.replacement import Handover, Positions, handover_of
from seqpar.integrations.transformers.documents import RowGroup
from seqpar.integrations.transformers.internals import attention_name, name_attention
from seqpar.integrations.transformers.probe.reference import (
    PACKED_AT,
    Probe,
    Reference,
    difference,
    evaluating,
    refer,
    row_arguments,
)
from seqpar.integrations.transformers.probe.rows import Trace, culprit, run_traced
from seqpar.layout import contiguous
from seqpar.strategies import Plan

LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Findings:
    """What the runs found.

    Args:
        causal: whether all layers that attend are causal.
        first_position: what the model counts positions from: 0, or as RoBERTa does, 1 after its padding.
        counts_seen: whether positions that it is not given are counted over what attention_mask shows.
        packs: whether positions that start anew are documents to it, on one device.
        numbers: of the modules that attend, in the order in which they do; those that attend once in a call.
    """

    causal: bool
    first_position: int
    counts_seen: bool
    packs: bool
    numbers: Mapping[nn.Module, int] = field(repr=False)


def try_out(inner: PreTrainedModel, reference: Reference | None = None) -> Findings:
    """Runs the model on a few tokens, here alone, and says what was found. Switches its attention.

    The same rows must come out of the model as it was and as it will be; and rows must not depend on each
    other but through the attention function. All ranks that its weights are sharded over must call.

    Args:
        reference: the model as it was; by default with eager attention. A model whose attention was replaced
            cannot do that: it was compared then.

    Raises:
        NotImplementedError: they do, or it returns what is not one row per token, or its attention does
            more than what reaches the attention function.
    """
    probe, handover = Probe.of(inner), handover_of(inner)
    across = Group.alone() if handover is None else handover.group
    num_rows = probe.tokens.shape[1]
    with evaluating(inner):
        _switch(inner, handover)
        if not _takes_positions(inner):
            raise NotImplementedError(f"{type(inner).__name__} takes no position_ids")
        if reference is None and handover is None:
            inner.set_attn_implementation("eager")
            reference = refer(inner)
            inner.set_attn_implementation(NAME)
        first = handover.positions.first if handover and handover.positions else 0
        first = reference.first if reference else first
        arguments = row_arguments(inner, probe.tokens, probe.in_order + first)
        one = _run_traced(inner, arguments, num_rows)
        moved = (probe.runs.positions + first).to(inner.device)
        others = row_arguments(inner, probe.runs.others.to(inner.device), moved)
        two = _run_traced(inner, others, num_rows)
        with agreed(across, "trying out: rows"):
            _check_rows(inner, culprit(one, two, probe.runs), one)
        alone = Call(Plan(Group.alone(), contiguous(num_rows, 1)))
        ours = run_alone(inner, first)
        with agreed(across, "trying out: outputs"):
            _check_equal(inner, reference.outputs if reference else ours, ours)
        apart = replace(alone, groups=(RowGroup(None, (0, PACKED_AT, num_rows)),))
        counts_seen = _counts_seen(inner, arguments, apart)
        packs = bool(handover and handover.positions and handover.positions.packs)
        if reference is not None:
            ours = inner(**arguments | reference.packed, seqpar=apart, return_dict=True)
            packs = difference(reference.of_packed, ours, slice(PACKED_AT, None)) is None
    if handover is not None:
        handover.positions = Positions(first, packs)
    return _findings(one, first, counts_seen=counts_seen, packs=packs)


def run_alone(inner: PreTrainedModel, first: int) -> Any:
    """The outputs of a model that attends by a plan of one rank. All ranks of its weights must call."""
    probe = Probe.of(inner)
    arguments = row_arguments(inner, probe.tokens, probe.in_order + first)
    plan = Call(Plan(Group.alone(), contiguous(probe.tokens.shape[1], 1)))
    with evaluating(inner):
        return inner(**arguments, seqpar=plan, return_dict=True)


def _switch(inner: PreTrainedModel, handover: Handover | None) -> None:
    """Has the model make the masks of seqpar and, where it attends by itself, use its attention function."""
    if handover is not None and not handover.switches:
        name_attention(inner.config, NAME)  # for its masks; nothing else looks at it any more
        return
    inner.set_attn_implementation(NAME)
    if attention_name(inner.config) != NAME:
        raise NotImplementedError(_own_attention(inner))


def _check_rows(inner: PreTrainedModel, at_fault: str | None, trace: Trace) -> None:
    if at_fault is not None:
        raise NotImplementedError(
            f"{at_fault} lets rows depend on each other outside of the attention function, which a shard "
            "would cut in silence"
        )
    if not trace.layers:
        raise NotImplementedError(
            f"no layer of {type(inner).__name__} calls the attention function"
        )
    _check_layer_types(inner)
    _check_output(inner, trace.output, trace.num_rows)


def _takes_positions(inner: PreTrainedModel) -> bool:
    parameters = inspect.signature(inner.forward).parameters
    return "position_ids" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def _own_attention(inner: PreTrainedModel) -> str:
    """What to say of a model that transformers itself does not switch."""
    named = [
        f"{name} ({type(m).__name__})"
        for name, m in inner.named_modules()
        if "Attention" in type(m).__name__
    ]
    return (
        f"{named[0] if named else type(inner).__name__} computes attention by itself and not through the "
        "attention function of transformers, so it cannot be switched; replace_attention of "
        "seqpar.integrations.transformers puts another in its place in models that it knows"
    )


def _run_traced(inner: PreTrainedModel, arguments: dict[str, Any], num_rows: int) -> Trace:
    """A traced run; what fails in it is what the model does with a mask that is none, or with the plan."""
    try:
        return run_traced(inner, arguments | {"return_dict": True}, num_rows)
    except MissingPlanError as error:
        raise NotImplementedError(
            f"{type(inner).__name__} does not pass its keyword arguments on to its attention, so no plan can "
            "reach it"
        ) from error
    except (NotImplementedError, ValueError):
        raise
    except Exception as error:
        raise NotImplementedError(
            f"{type(inner).__name__} looks into its masks, which a shard does not have: {error}"
        ) from error


def _check_layer_types(inner: PreTrainedModel) -> None:
    """Refuses layers that attend to a choice of what their mask shows, which few tokens may not reveal."""
    for number, kind in enumerate(getattr(inner.config, "layer_types", None) or ()):
        if kind not in LAYER_TYPES:
            raise NotImplementedError(
                f"layer {number} of {type(inner).__name__} is {kind!r}; known are {sorted(LAYER_TYPES)}"
            )


def _check_output(inner: PreTrainedModel, output: Any, num_rows: int) -> None:
    for name, value in output.items():
        if isinstance(value, Tensor) and tuple(value.shape[:2]) != (1, num_rows):
            raise NotImplementedError(
                f"{type(inner).__name__} returns {name} {tuple(value.shape)} for {num_rows} tokens, which is "
                "not one row per token; take the model without its pooling or head"
            )


def _check_equal(inner: PreTrainedModel, expected: Any, ours: Any) -> None:
    found = difference(expected, ours)
    if found is not None:
        own = "eager" if handover_of(inner) is None else "its own"
        raise NotImplementedError(
            f"{type(inner).__name__} returns other {found[0]} than with {own} attention, off by "
            f"{found[1]:.2g}: layers do something that does not reach the attention function, or it numbers "
            "positions in a way of its own"
        )


def _counts_seen(inner: PreTrainedModel, arguments: dict[str, Any], apart: Call) -> bool:
    """Whether a model counts its positions from the first token that attention_mask shows."""
    mask = arguments["attention_mask"].clone()
    mask[:, :PACKED_AT] = 0
    call = replace(apart, hidden=as_bytes(mask))
    given = arguments | {"attention_mask": mask, "seqpar": call, "return_dict": True}
    own = inner(**{name: x for name, x in given.items() if name != "position_ids"})
    return difference(own, inner(**given), slice(PACKED_AT, None)) is not None


def _findings(trace: Trace, first_position: int, *, counts_seen: bool, packs: bool) -> Findings:
    calls = Counter(layer.module for layer, _ in trace.layers)
    once = [layer.module for layer, _ in trace.layers if calls[layer.module] == 1]
    return Findings(
        causal=all(terms.mask.causal for _, terms in trace.layers),
        first_position=first_position,
        counts_seen=counts_seen,
        packs=packs,
        numbers={module: number for number, module in enumerate(once)},
    )
