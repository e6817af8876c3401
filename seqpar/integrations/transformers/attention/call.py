"""`Call`: what travels with a call of a model to its attention function, and attends there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NoReturn

import torch
from torch import Tensor, nn

from seqpar.calls.options import told_of
from seqpar.comm import Group, agreed
from seqpar.functional import attention
from seqpar.integrations.transformers.attention.terms import Layer, Terms, dropout_of
from seqpar.integrations.transformers.documents import RowGroup
from seqpar.strategies import Plan
from seqpar_kernels.transfer import on_device


class Call:
    """The plan of a model's call, to which each layer adds its mask and score.

    Args:
        plan: group, layout, strategy and implementation.
        groups: the rows of the batch by their documents.
        hidden: the padding mask of this rank's rows, as bytes; `None` if it hides nothing.
        seed: of the dropout of this call; `None`: there may be none.
        numbers: of the modules that attend, for their dropout.
    """

    # docs/design.md: what a model is called with is no dataclass of ours
    def __init__(
        self,
        plan: Plan,
        groups: tuple[RowGroup, ...] = (RowGroup(None, None),),
        hidden: bytes | None = None,
        seed: int | None = None,
        numbers: Mapping[nn.Module, int] = MappingProxyType({}),
    ) -> None:
        self.plan, self.groups, self.hidden, self.seed = plan, groups, hidden, seed
        self.numbers = numbers

    @property
    def described(self) -> tuple[object, ...]:
        """What ranks that hold the same rows must have in common."""
        plan = self.plan
        return told_of(plan), plan.group.rank, self.groups, self.hidden, self.seed

    def attend(self, layer: Layer) -> Tensor:
        """The rows `[b sl hq vd]` of a layer's attention. All ranks must call.

        Raises:
            NotImplementedError, ValueError: a layer asks for what `Terms.of` refuses.
            DesyncError: another rank raised; and what `seqpar.attention` does.
        """
        try:
            plans = self._plans(layer)
        except (ValueError, TypeError, NotImplementedError) as error:
            refuse(self.plan.group, type(error)(f"{layer.name}: {error}"), error)
        q, k, v = layer.rows_first()
        if self.groups[0].rows is None:
            return attention(q, k, v, plans[0])
        parts = [
            attention(q[rows], k[rows], v[rows], plan)
            for plan, rows in zip(plans, (list(g.rows or ()) for g in self.groups), strict=True)
        ]
        order = on_device([row for g in self.groups for row in g.rows or ()], q.device)
        return torch.cat(parts)[torch.argsort(order)]

    def _plans(self, layer: Layer) -> list[Plan]:
        """Makes the plan of each group of rows."""
        terms = Terms.of(layer)
        if getattr(layer.mask, "hidden", None) != self.hidden:
            raise ValueError(
                "the model was given another attention_mask than its plan; give shard(batch) the mask and "
                "call the model with what it returns"
            )
        number = self.numbers.get(layer.module)
        return [
            replace(
                self.plan,
                mask=replace(terms.mask, documents=group.documents),
                score=terms.score,
                dropout=dropout_of(terms.dropout, self.seed, number, group.first),
                first_head=terms.first_head,
            )
            for group in self.groups
        ]


def refuse(group: Group, error: Exception, cause: Exception | None = None) -> NoReturn:
    """Raises `error`, and a DesyncError that quotes it on ranks that are about to attend."""
    with agreed(group, operation="attention"):
        raise error from cause
    raise AssertionError("agreed lets errors through")
