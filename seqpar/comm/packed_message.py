"""`PackedMessage`: several tensors of the same rows and heads as one message for each dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from seqpar_kernels import accumulation_dtype

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class PackedMessage:
    """The form in which tensors `[b rows h w]` and `[b rows h]` travel together: side by side, rows first.

    Side by side means that k and v of a row are neighbours in memory. Each is a view of what was received,
    with stride 1 in its width: nothing is unpacked. Rows first means that some rows of a
    packed message are one piece of memory, whatever the batch.
    """

    widths: tuple[int | None, ...]  # None: the tensor has no width
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(block: Sequence[Tensor]) -> PackedMessage:
        """The packed message that these tensors make."""
        widths = tuple(x.shape[3] if x.ndim == 4 else None for x in block)
        return PackedMessage(widths, tuple(x.dtype for x in block))

    def of_sums(self) -> PackedMessage:
        """The same tensors in the type that their sums are in, which is one message."""
        return PackedMessage(self.widths, tuple(accumulation_dtype(dtype) for dtype in self.dtypes))

    @cached_property
    def messages(self) -> list[torch.dtype]:
        """The dtype of each message."""
        return list(dict.fromkeys(self.dtypes))

    @cached_property
    def _parts(self) -> list[tuple[list[int], list[int]]]:
        """By message, which of the tensors it holds, and their widths."""
        held = [[n for n, t in enumerate(self.dtypes) if t == dtype] for dtype in self.messages]
        return [(places, [self.widths[n] or 1 for n in places]) for places in held]

    def pack(self, block: Sequence[Tensor]) -> Tensors:
        """The messages, each `[rows b h w]` and contiguous. Copies."""
        wide = [x if x.ndim == 4 else x.unsqueeze(-1) for x in block]
        return tuple(
            # docs/design.md: tensors travel as packed messages
            torch.cat([x.transpose(0, 1) for x in wide if x.dtype == dtype], dim=-1).contiguous()
            for dtype in self.messages
        )

    def unpack(self, messages: Sequence[Tensor]) -> Tensors:
        """The tensors `[b rows h (w)]`, views of the messages."""
        found: dict[int, Tensor] = {}
        for message, (places, widths) in zip(messages, self._parts, strict=True):
            parts = message.transpose(0, 1).split_with_sizes(widths, -1)
            found.update(zip(places, parts, strict=True))
        return tuple(
            found[n] if w is not None else found[n].squeeze(-1) for n, w in enumerate(self.widths)
        )

    def empty(self, like: Tensor, rows: int, batch: int, heads: int) -> Tensors:
        """Messages to receive, on the device of a tensor."""
        return tuple(
            like.new_empty(rows, batch, heads, sum(widths), dtype=dtype)
            for dtype, (_, widths) in zip(self.messages, self._parts, strict=True)
        )
