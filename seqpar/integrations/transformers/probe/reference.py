"""A model as it is, run on a few tokens: what must not change when its attention is switched or replaced."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar.integrations.transformers.probe.rows import NUM_ROWS, TwoRuns, same_rows, two_runs

PACKED_AT = 3  # where a second document starts, and up to where padding is, when a model is tried


@dataclass(frozen=True)
class Probe:
    """The few tokens that a model is run on, and where they are."""

    runs: TwoRuns
    tokens: Int[Tensor, "1 r"]
    in_order: Int[Tensor, "1 r"]

    @staticmethod
    def of(inner: PreTrainedModel) -> Probe:
        """That of a model, on its device."""
        num_rows = min(NUM_ROWS, getattr(inner.config, "max_position_embeddings", None) or NUM_ROWS)
        runs = two_runs(num_rows, inner.config.vocab_size, _special_tokens(inner))
        in_order = torch.arange(num_rows, device=inner.device)[None]
        return Probe(runs, runs.tokens.to(inner.device), in_order)


@dataclass(frozen=True)
class Reference:
    """What comes out of a model that attends by itself.

    Args:
        outputs: of the tokens in order.
        first: what it counts their positions from.
        packed: arguments of two documents in one row.
        of_packed: its outputs then.
    """

    outputs: Any
    first: int
    packed: dict[str, Any]
    of_packed: Any


def refer(inner: PreTrainedModel) -> Reference:
    """Runs the model on a few tokens as it is. All ranks that its weights are sharded over must call."""
    probe = Probe.of(inner)
    with evaluating(inner):
        given = common_arguments(inner, input_ids=probe.tokens, return_dict=True)
        outputs = inner(**given)
        first = _first_position(inner, probe, outputs)
        packed = _packed(probe, first)
        return Reference(outputs, first, packed, inner(**given, **packed))


def row_arguments(
    inner: PreTrainedModel, input_ids: Tensor, position_ids: Tensor
) -> dict[str, Any]:
    """Arguments as `SequenceParallel.shard` gives them.

    The mask is always there: without one, models take a jump of position_ids for a new document.
    """
    mask = torch.ones_like(input_ids)
    return common_arguments(
        inner, input_ids=input_ids, position_ids=position_ids, attention_mask=mask
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; afterwards every module is in its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _special_tokens(inner: PreTrainedModel) -> list[int]:
    """Tokens that may change what a model does with others, such as the mask token of ESM."""
    pairs = sorted(inner.config.to_dict().items())
    ids = {x for n, x in pairs if n.endswith("_token_id") and isinstance(x, int)}
    padding = getattr(inner.config, "pad_token_id", None)
    return sorted(i for i in ids if i != padding and 0 <= i < inner.config.vocab_size)


def common_arguments(inner: PreTrainedModel, **arguments: Any) -> dict[str, Any]:
    """Arguments for every call: no cache is kept, where the model could."""
    takes_cache = "use_cache" in inspect.signature(inner.forward).parameters
    return arguments | ({"use_cache": False} if takes_cache else {})


def _first_position(inner: PreTrainedModel, probe: Probe, expected: Any) -> int:
    """What the model counts positions from when it is given none."""
    after_padding = (getattr(inner.config, "pad_token_id", None) or 0) + 1
    given = common_arguments(inner, input_ids=probe.tokens, return_dict=True)
    given["position_ids"] = probe.in_order
    if difference(expected, inner(**given)) is not None:
        given["position_ids"] = probe.in_order + after_padding
        if difference(expected, inner(**given)) is None:
            return after_padding
    return 0


def _packed(probe: Probe, first: int) -> dict[str, Any]:
    """Arguments of two documents in one row."""
    starts = (0, PACKED_AT, probe.tokens.shape[1])
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(starts)])[None]
    return {"position_ids": positions.to(probe.tokens.device) + first}


def difference(expected: Any, output: Any, rows: slice = slice(None)) -> tuple[str, float] | None:
    """The first of a model's outputs that is another, and how far it is off."""
    for name, value in expected.items():
        if isinstance(value, Tensor) and not same_rows(value[0, rows], output[name][0, rows]):
            return name, float((value - output[name]).abs().max())
    return None
