"""`MicroBatches`: those of a step that come one by one, so that its tokens are known only at its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from seqpar.loss import gradient_times


class MicroBatches:
    """Weighs gradients of micro-batches by their tokens, relative to the first, and divides them at the end.

    A trainer divides each loss by their number, whatever their tokens.
    """

    # docs/design.md: micro-batches that come one by one are divided afterwards

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        # Of the micro-batch that is under way.
        self.num_losses = 0

    def weighed(self, loss: Tensor, count: Tensor, num: int) -> Tensor:
        """The loss of a micro-batch, with its gradient weighed.

        Args:
            count: the tokens of the micro-batch, over all ranks.
            num: of micro-batches, by which the trainer divides.
        """
        self.num_losses += 1
        if num == 1:
            return loss
        if self.num_losses == 1:
            self._counts.append(count.to(loss.dtype))
        return gradient_times(loss, num * self._counts[-1] / self._counts[0].clamp(min=1))

    @torch.no_grad()
    def divide(self, parameters: Iterable[Tensor]) -> None:
        """Makes the gradients those of the mean over the tokens of all micro-batches since the last time."""
        counts = self._counts
        self.forget()
        if not counts:
            return
        share = counts[0].clamp(min=1) / sum(counts[1:], counts[0]).clamp(min=1)
        for p in parameters:
            if p.grad is not None:
                shard: Any = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                shard.mul_(share.to(shard.dtype))

    def forget(self) -> None:
        """Begins a step, whatever became of the last."""
        self._counts, self.num_losses = [], 0
