"""`PackedMessage`: tensors of the same rows and heads as one message for each dtype; large ones alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from seqpar.comm.together import SMALL
from seqpar_kernels import accumulation_dtype

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class PackedMessage:
    """The form in which tensors `[b rows h w]` and `[b rows h]` travel together: side by side, rows first.

    Side by side means that k and v of a row are neighbours in memory. Each is a view of what was received,
    with stride 1 in its width: nothing is unpacked. Rows first means that some rows of a
    packed message are one piece of memory, whatever the batch. A message of one tensor is that tensor's
    memory, where its rows come first as it is.

    Args:
        widths: `None` where a tensor has none.
        groups: which tensors, of one dtype, are one message.
    """

    widths: tuple[int | None, ...]
    dtypes: tuple[torch.dtype, ...]
    groups: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(block: Sequence[Tensor], most_rows: int = 0) -> PackedMessage:
        """The packed message that these tensors make.

        Args:
            most_rows: of any rank. Tensors of which so many rows are large travel by themselves, so that they
                need not be copied; the same on all ranks.
        """
        widths, dtypes = zip(
            *((x.shape[3] if x.ndim == 4 else None, x.dtype) for x in block), strict=True
        )
        alone = [n for n, x in enumerate(block) if _is_sent_as_it_is(x, most_rows)]
        joined = [
            tuple(n for n, t in enumerate(dtypes) if t == dtype and n not in alone)
            for dtype in dict.fromkeys(dtypes)
        ]
        groups = (*((n,) for n in alone), *(group for group in joined if group))
        return PackedMessage(widths, dtypes, groups)

    def of_sums(self) -> PackedMessage:
        """The same tensors in the type that their sums are in, which is one message."""
        dtypes = tuple(accumulation_dtype(dtype) for dtype in self.dtypes)
        return PackedMessage(self.widths, dtypes, (tuple(range(len(dtypes))),))

    @cached_property
    def _parts(self) -> list[tuple[torch.dtype, list[int]]]:
        """By message, its dtype and the widths of its tensors."""
        return [
            (self.dtypes[group[0]], [self.widths[n] or 1 for n in group]) for group in self.groups
        ]

    @cached_property
    def _is_split(self) -> bool:
        """Whether one message is cut in tensors and no more is done, as for k and v."""
        return len(self.groups) == 1 < len(self.widths) and None not in self.widths

    def pack(self, block: Sequence[Tensor]) -> Tensors:
        """The messages, each `[rows b h w]` and contiguous; of the tensors' own memory where that is so."""
        # docs/design.md: tensors travel as packed messages
        wide = [(x if x.ndim == 4 else x.unsqueeze(-1)).transpose(0, 1) for x in block]
        return tuple(
            (
                torch.cat([wide[n] for n in group], -1) if len(group) > 1 else wide[group[0]]
            ).contiguous()
            for group in self.groups
        )

    def unpack(self, messages: Sequence[Tensor]) -> Tensors:
        """The tensors `[b rows h (w)]`, views of the messages."""
        if self._is_split:
            return messages[0].transpose(0, 1).split_with_sizes(self._parts[0][1], -1)
        found: dict[int, Tensor] = {}
        for message, group, (_, widths) in zip(messages, self.groups, self._parts, strict=True):
            rows_second = message.transpose(0, 1)
            if len(group) == 1:
                found[group[0]] = rows_second
                continue
            found.update(zip(group, rows_second.split_with_sizes(widths, -1), strict=True))
        return tuple(
            found[n] if w is not None else found[n].squeeze(-1) for n, w in enumerate(self.widths)
        )

    def empty(self, like: Tensor, rows: int, batch: int, heads: int) -> Tensors:
        """Messages to receive, on the device of a tensor."""
        return tuple(
            like.new_empty(rows, batch, heads, sum(widths), dtype=dtype)
            for dtype, widths in self._parts
        )


def _is_sent_as_it_is(x: Tensor, rows: int) -> bool:
    """Whether so many rows of it are large, and rows come first. Ranks without rows find the same."""
    return x.shape[0] == 1 and rows * math.prod(x.shape[2:]) * x.element_size() > SMALL
