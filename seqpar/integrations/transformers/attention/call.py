"""`Call`: what travels with a call of a model to its attention function, and attends there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NoReturn

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from seqpar.calls.options import told_of
from seqpar.comm import Group, agreed
from seqpar.functional import attention, cast_by_autocast
from seqpar.integrations.transformers.attention.blocks import Blocks
from seqpar.integrations.transformers.attention.patterns import Pattern
from seqpar.integrations.transformers.attention.temperature import tempered
from seqpar.integrations.transformers.attention.terms import IGNORED, Layer, Terms, dropout_of
from seqpar.integrations.transformers.documents import Row, masked
from seqpar.layout import Mask
from seqpar.strategies import Plan


class Call:
    """The plan of a model's call, to which each layer adds its mask and score.

    Args:
        plan: group, layout, strategy and implementation.
        rows: what tokens may meet, of each row of the batch, or of all where they are alike.
        hidden: the padding mask of this rank's rows, as bytes; `None` if it hides nothing.
        all_hidden: that of the whole rows.
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
        all_hidden: bytes | None = None,
    ) -> None:
        self.plan, self.rows, self.hidden, self.seed = plan, rows, hidden, seed
        self.numbers = numbers
        self.all_hidden = hidden if plan.group.size == 1 else all_hidden
        # Where a model makes the masks of its text layers: one, of which they make theirs, or by their type.
        self.handed: Pattern | Mapping[str, Pattern] | None = None
        # The mask of images that layers attend to beside the sequence: `[b 1 sl j]`, added to scores.
        self.image_mask: Tensor | None = None
        self._masks: dict[tuple[object, ...], Mask | tuple[Mask, ...]] = {}

    def mask(
        self, own: Mask, chunk: int | None = None, blocks: Blocks | None = None
    ) -> Mask | tuple[Mask, ...]:
        """The mask of a layer for this batch. Made outside of compiled code it is no constant there.

        Args:
            chunk, blocks: see `Pattern`.
        """
        key = own.causal, own.window, chunk, blocks
        if key not in self._masks:
            seen = () if blocks is None else blocks.masks()
            self._masks[key] = masked(own, self.rows, self.plan.layout.length, chunk, seen)
        return self._masks[key]

    @property
    def described(self) -> tuple[object, ...]:
        """What ranks that hold the same rows must have in common."""
        plan = self.plan
        return told_of(plan), plan.group.rank, self.rows, self.hidden, self.seed

    def attend(self, layer: Layer, terms: Terms | None = None) -> Tensor:
        """The rows `[b sl hq vd]` of a layer's attention. All ranks must call.

        Args:
            terms: of the layer, if they are known.

        Raises:
            NotImplementedError, ValueError: a layer asks for what `Terms.of` refuses.
            DesyncError: another rank raised; and what `seqpar.attention` does.
        """
        try:
            if self.image_mask is not None and layer.mask is self.image_mask:
                return attend_to_images(layer)
            plan = self._plan(layer, terms)
        except (ValueError, TypeError, NotImplementedError) as error:
            refuse(self.plan.group, type(error)(f"{layer.name}: {error}"), error)
        q, k, v = layer.rows_first()
        return attention(tempered(layer.module, q, plan), k, v, plan)

    def _plan(self, layer: Layer, terms: Terms | None) -> Plan:
        """Makes the plan of a layer."""
        pattern = self.handed if isinstance(self.handed, Pattern) else layer.mask
        # Where there are blocks, transformers never leaves out the mask and goes by what the layer says.
        is_given = self.handed is not None and getattr(pattern, "blocks", None) is not None
        terms = terms or Terms.of(layer, says_its_form=not is_given)
        if pattern.form != layer.mask.form:
            raise NotImplementedError(
                f"the model hands it a mask that is {pattern}, and it makes one that is {layer.mask}"
            )
        is_whole = pattern.length == self.plan.layout.length
        if pattern.blocks is not None and not is_whole:
            raise NotImplementedError(
                "its mask has blocks of a shard's tokens, and those of the whole are not known"
            )
        if pattern.hidden != (self.all_hidden if is_whole else self.hidden):
            raise ValueError(
                "the model was given another attention_mask than its plan; give shard(batch) the mask and "
                "call the model with what it returns"
            )
        number = self.numbers.get(layer.module)
        return replace(
            self.plan,
            mask=self.mask(terms.mask, terms.chunk, pattern.blocks),
            score=terms.score,
            dropout=dropout_of(terms.dropout, self.seed, number),
            first_head=terms.first_head,
        )


def refuse(group: Group, error: Exception, cause: Exception | None = None) -> NoReturn:
    """Raises `error`, and a DesyncError that quotes it on ranks that are about to attend."""
    with agreed(group, operation="attention"):
        raise error from cause
    raise AssertionError("agreed lets errors through")


def attend_to_images(layer: Layer) -> Tensor:
    """The rows `[b sl hq vd]` of cross attention to images, whose keys every rank has: nothing is sent.

    Raises:
        NotImplementedError: the layer drops weights, or asks for more than a scale.
    """
    terms = {name: x for name, x in layer.terms.items() if x is not None and name not in IGNORED}
    scale, dropout = terms.pop("scaling", None), terms.pop("dropout", 0.0)
    if dropout or terms:
        raise NotImplementedError(
            f"in cross attention to images {sorted(terms) or 'dropout'} is not known; set dropout to 0"
        )
    q, k, v = cast_by_autocast(layer.q, layer.k, layer.v)
    mask = layer.mask.to(q.dtype)
    rows = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return rows.transpose(1, 2)
