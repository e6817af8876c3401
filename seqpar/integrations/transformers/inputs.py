"""`Inputs`: this rank's part of a batch, as a model takes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqpar.layout import Layout


class Inputs(dict[str, Any]):
    """Keyword arguments for the model, `model(**inputs)`; and beside them what is not for the model.

    Args:
        labels: `[b sl]`, one for the logits of the same row, shifted already; `None` without labels. The
            model does not get them: it would shift them once more and take the mean of this rank alone.
        layout: which rank holds which positions.
        beside: this rank's rows of the tensors that `shard` was given in `sequences` and `shifted`, by name.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        labels: Tensor | None,
        layout: Layout,
        beside: dict[str, Tensor],
    ) -> None:
        super().__init__(arguments)
        self.labels, self.layout, self.beside = labels, layout, beside
