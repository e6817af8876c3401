"""`Call`: what travels with a call of a model to its attention function, and attends there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NoReturn

from torch import Tensor, nn

from seqpar.calls.options import told_of
from seqpar.comm import Group, agreed
from seqpar.functional import attention
from seqpar.integrations.transformers.attention.temperature import tempered
from seqpar.integrations.transformers.attention.terms import Layer, Terms, dropout_of
from seqpar.integrations.transformers.documents import Row, masked
from seqpar.layout import Mask
from seqpar.strategies import Plan


class Call:
    """The plan of a model's call, to which each layer adds its mask and score.

    Args:
        plan: group, layout, strategy and implementation.
        rows: what tokens may meet, of each row of the batch, or of all where they are alike.
        hidden: the padding mask of this rank's rows, as bytes; `None` if it hides nothing.
        seed: of the dropout of this call; `None`: there may be none.
        numbers: of the modules that attend, for their dropout.
    """

    # docs/design.md: what a model is called with is no dataclass of ours
    def __init__(
        self,
        plan: Plan,
        rows: tuple[Row, ...] = (None,),
        hidden: bytes | None = None,
        seed: int | None = None,
        numbers: Mapping[nn.Module, int] = MappingProxyType({}),
    ) -> None:
        self.plan, self.rows, self.hidden, self.seed = plan, rows, hidden, seed
        self.numbers = numbers
        self._masks: dict[tuple[bool, object, int | None], Mask | tuple[Mask, ...]] = {}

    def mask(self, own: Mask, chunk: int | None = None) -> Mask | tuple[Mask, ...]:
        """The mask of a layer for this batch. Made outside of compiled code it is no constant there.

        Args:
            chunk: see `Pattern`.
        """
        key = own.causal, own.window, chunk
        if key not in self._masks:
            self._masks[key] = masked(own, self.rows, self.plan.layout.length, chunk)
        return self._masks[key]

    @property
    def described(self) -> tuple[object, ...]:
        """What ranks that hold the same rows must have in common."""
        plan = self.plan
        return told_of(plan), plan.group.rank, self.rows, self.hidden, self.seed

    def attend(self, layer: Layer) -> Tensor:
        """The rows `[b sl hq vd]` of a layer's attention. All ranks must call.

        Raises:
            NotImplementedError, ValueError: a layer asks for what `Terms.of` refuses.
            DesyncError: another rank raised; and what `seqpar.attention` does.
        """
        try:
            plan = self._plan(layer)
        except (ValueError, TypeError, NotImplementedError) as error:
            refuse(self.plan.group, type(error)(f"{layer.name}: {error}"), error)
        q, k, v = layer.rows_first()
        return attention(tempered(layer.module, q, plan), k, v, plan)

    def _plan(self, layer: Layer) -> Plan:
        """Makes the plan of a layer."""
        terms = Terms.of(layer)
        if getattr(layer.mask, "hidden", None) != self.hidden:
            raise ValueError(
                "the model was given another attention_mask than its plan; give shard(batch) the mask and "
                "call the model with what it returns"
            )
        number = self.numbers.get(layer.module)
        return replace(
            self.plan,
            mask=self.mask(terms.mask, terms.chunk),
            score=terms.score,
            dropout=dropout_of(terms.dropout, self.seed, number),
            first_head=terms.first_head,
        )


def refuse(group: Group, error: Exception, cause: Exception | None = None) -> NoReturn:
    """Raises `error`, and a DesyncError that quotes it on ranks that are about to attend."""
    with agreed(group, operation="attention"):
        raise error from cause
    raise AssertionError("agreed lets errors through")
