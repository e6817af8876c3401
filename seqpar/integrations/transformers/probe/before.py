"""The runs of a model as it is, before its attention is switched or replaced; see `trial`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar.data import Labels
from seqpar.integrations.transformers.probe.compare import Rows, difference, rows_of
from seqpar.integrations.transformers.probe.own_loss import own_labels
from seqpar.integrations.transformers.probe.tokens import Tokens, padding_token


@dataclass(frozen=True)
class Before:
    """What a model gave while it attended by itself: the runs without a mask.

    Args:
        attention: the name of its attention, as transformers has it.
        outputs: of the tokens in order.
        first_position: what it counts their positions from.
        packed: its outputs for two documents in one sequence.
        labels: what its own loss compares a row with, see `own_loss`.
    """

    attention: str
    outputs: Rows
    first_position: int
    packed: Rows
    labels: Labels | None


def run_before(inner: PreTrainedModel, attention: str) -> Before:
    """Runs a model as it is, without a mask. All ranks that its weights are sharded over must call.

    Args:
        attention: the name of the attention that it has, as transformers knows it.

    Raises:
        NotImplementedError: it takes no positions, or returns what is not one row per token.
    """
    parameters = inspect.signature(inner.forward).parameters
    if not any(n == "position_ids" or p.kind == p.VAR_KEYWORD for n, p in parameters.items()):
        raise NotImplementedError(f"{type(inner).__name__} takes no position_ids")
    tokens, first = Tokens.of(inner), 0
    with evaluating(inner):
        given = tokens.runs(inner, first=0)
        plain = inner(**given.plain)
        _check_output(inner, plain, tokens.num_rows)
        outputs = rows_of(plain, 0)
        labels = own_labels(inner, given.plain, plain)
        numbered = inner(**given.numbered)
        if difference(outputs, rows_of(numbered, 0)) is not None:
            after_padding = (padding_token(inner) or 0) + 1
            moved = inner(**tokens.runs(inner, first=after_padding).numbered)
            if difference(outputs, rows_of(moved, 0)) is None:
                first, numbered = after_padding, moved
    return Before(attention, outputs, first, rows_of(numbered, 1), labels)


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


def _check_output(inner: PreTrainedModel, output: Any, num_rows: int) -> None:
    for name, value in output.items():
        if isinstance(value, Tensor) and tuple(value.shape[:2]) != (1, num_rows):
            raise NotImplementedError(
                f"{type(inner).__name__} returns {name} {tuple(value.shape)} for {num_rows} tokens, which is "
                "not one row per token; take the model without its pooling or head"
            )
