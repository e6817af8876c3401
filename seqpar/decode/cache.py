"""`KVCache`: keys and values stay where prefill left them; the few queries of a step are everywhere.

Each rank attends its own keys, and the partial results are merged by their lse: what is sent depends on
the queries, not on the length of the sequence.
Source: the split over keys of Flash-Decoding (Dao et al. 2023), over ranks instead of the cores of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqpar.calls.options import told
from seqpar.comm import Ranks, agreed, combine, group_of
from seqpar.decode.check import check_new, check_prefill, check_queries
from seqpar.decode.parts import merged, part_of
from seqpar.decode.rows import Grown, Held, deal
from seqpar.decode.visible import continued
from seqpar.layout import Layout, Mask
from seqpar_kernels import Implementation, Request, Score, choose
from seqpar_kernels.integers import is_integer


class KVCache:
    """Keys and values of one attention layer, spread over the ranks of a group. All ranks make one.

    Queries and new keys are *replicated*: every rank must pass the same, to the bit, which is not compared.
    So all get the same output, to the bit. All sequences of a batch have one length; there is no padding.
    Nothing here has a gradient: tensors that require one are refused unless gradients are off.

    Every method is agreed on by all ranks before it does anything. That costs 8 bytes to every other rank
    and one wait; `step` does the work of two for the price of one.

    Args:
        group: the ranks that share the sequence: a `seqpar.Group`, a process group or a mesh dimension.
        layout: which of them holds which positions of the prefill: any, as attention left it. A `length`
            of 0 starts an empty cache.
        k, v: this rank's rows of the prefill. They are kept, not copied: do not write to them.
        mask: what a position may see. New positions continue the last document; where its last two boundaries
            are equal, that one is empty and new positions begin a document.
        score: what happens to q.k before the softmax.
        implementation: of the block math; `None` chooses by device, dtype and what is asked.

    Raises:
        TypeError: an argument is of the wrong kind, or a tensor not floating point.
        ValueError: shapes or rows do not fit together or do not fit the layout, documents do not end where
            the prefill does, or a tensor requires a gradient.
        NotImplementedError: no implementation serves this device and dtype, or not the requested one.
        DesyncError: the ranks differ, or another rank raised one of the above.
    """

    def __init__(
        self,
        group: Ranks,
        layout: Layout,
        k: Float[Tensor, "b sl hkv d"],
        v: Float[Tensor, "b sl hkv vd"],
        *,
        mask: Mask = Mask(causal=True),  # noqa: B008 - frozen
        score: Score = Score(),  # noqa: B008 - frozen
        implementation: Implementation | None = None,
    ) -> None:
        group = group_of(group)
        with agreed(group, operation="KVCache") as claim:
            check_prefill(group, layout, k, v, mask, score)
            group.transport.check_device(k.device)
            self._mask, self._score = continued(mask), score.resolve(k.shape[3])
            # There are no queries yet, and k has the type, width and device that they must have.
            terms = (*self._score.terms, *self._mask.terms)
            request = Request.of(k, v, terms, windowed=self._mask.is_windowed)
            self.implementation = choose(request, implementation)
            claim |= {
                **told(
                    layout=layout, mask=mask, score=self._score, implementation=self.implementation
                ),
                "batch": k.shape[0],
                "kv heads": k.shape[2],
                "widths (d, vd)": (k.shape[3], v.shape[3]),
                "dtype": k.dtype,
                "device": k.device.type,
            }
        group.transport.prepare(k.device)
        self.group, self.prefill_length = group, layout.length
        self._prefill = Held(k.detach(), v.detach(), layout.spans[group.rank])
        self._grown = Grown(self._prefill)
        self._rows = list(layout.rows)
        self._owners: list[int] = []  # of every position that was appended

    @property
    def length(self) -> int:
        """The number of positions in the cache, which is the position of the next token."""
        return self.prefill_length + len(self._owners)

    @property
    def rows(self) -> tuple[int, ...]:
        """The number of positions that each rank holds."""
        return tuple(self._rows)

    def append(self, k: Float[Tensor, "b t hkv d"], v: Float[Tensor, "b t hkv vd"]) -> None:
        """Stores the keys and values of the next t positions. Sends nothing but the agreement.

        Each position goes to the rank that holds the fewest, the lowest of those: shards that differ become
        even, and then take turns. Memory for new rows doubles when it is full, so that on average a row is
        copied less than twice after it was stored.

        Raises:
            TypeError, ValueError: k or v does not fit the cache, or requires a gradient.
            DesyncError: the ranks differ, or another rank raised one of the above.
        """
        with agreed(self.group, operation="KVCache.append") as claim:
            check_new(k, v, self._prefill, self._score)
            claim |= self._state(k.shape[1])
        self._append(k, v)

    def attend(self, q: Float[Tensor, "b t hq d"]) -> Float[Tensor, "b t hq vd"]:
        """Attends queries at the last t positions in the cache: softmax(scale q k^T + mask) v, on every rank.

        The keys of these positions must have been appended. Partial results are merged in float32 (float64)
        in rank order; `decode_volume` says what that sends.

        Raises:
            TypeError, ValueError: q does not fit the cache, has more rows than it, or requires a gradient.
            DesyncError: the ranks differ, or another rank raised one of the above.
        """
        with agreed(self.group, operation="KVCache.attend") as claim:
            check_queries(q, self.length, self._prefill, self._score)
            claim |= self._state(q.shape[1]) | {"query heads": q.shape[2]}
        return self._attend(q)

    def step(
        self,
        q: Float[Tensor, "b t hq d"],
        k: Float[Tensor, "b t hkv d"],
        v: Float[Tensor, "b t hkv vd"],
    ) -> Float[Tensor, "b t hq vd"]:
        """Appends k and v and attends q, agreed on once. Raises what `append` and `attend` do."""
        with agreed(self.group, operation="KVCache.step") as claim:
            check_new(k, v, self._prefill, self._score)
            check_queries(q, self.length + k.shape[1], self._prefill, self._score)
            claim |= self._state(q.shape[1]) | {"query heads": q.shape[2], "new": k.shape[1]}
        self._append(k, v)
        return self._attend(q)

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on: rejected drafts. Those of the prefill stay.

        Raises:
            TypeError: length is not an integer.
            ValueError: length is less than that of the prefill, or more than there is.
            DesyncError: the ranks differ, or another rank raised one of the above.
        """
        with agreed(self.group, operation="KVCache.truncate") as claim:
            if not is_integer(length):
                raise TypeError(f"length must be an integer, got {length!r}")
            if not self.prefill_length <= length <= self.length:
                raise ValueError(
                    f"a cache of {self.length} positions, {self.prefill_length} of them from the prefill, "
                    f"cannot be cut to {length}"
                )
            claim |= self._state(length)
        while self.length > length:
            self._rows[self._owners.pop()] -= 1
        self._grown.truncate(self._owners.count(self.group.rank))

    def reorder(self, indices: Sequence[int] | Int[Tensor, "n"]) -> None:
        """Makes entry `indices[i]` of the batch its i-th: beams, or a prompt for several samples.

        Copies what this rank holds, prefill included, so while it runs there are two of it.

        Raises:
            TypeError: the indices are not integers.
            ValueError: the batch has no such entry.
            DesyncError: the ranks differ, or another rank raised one of the above.
        """
        with agreed(self.group, operation="KVCache.reorder") as claim:
            order = torch.as_tensor(indices, device=self._prefill.k.device)
            batch = self._prefill.k.shape[0]
            if order.is_floating_point() or order.dtype == torch.bool or order.ndim != 1:
                raise TypeError(f"indices must be integers [n], got {indices!r}")
            numbers = order.tolist()
            if not all(0 <= n < batch for n in numbers):
                raise ValueError(f"indices must be of the batch of {batch}, got {numbers}")
            claim |= self._state(len(numbers)) | {"indices": numbers}
        self._prefill.reorder(order)
        self._grown.reorder(order)

    def _state(self, num: int) -> dict[str, object]:
        """The claim of any call: what ranks must have in common before it."""
        return {"length": self.length, "batch": self._prefill.k.shape[0], "positions": num}

    def _append(self, k: Tensor, v: Tensor) -> None:
        owners = deal(self.rows, k.shape[1])
        mine = [n for n, owner in enumerate(owners) if owner == self.group.rank]
        # Asked for before owners are added, since those are what length counts.
        first = self.length
        self._grown.append(k[:, mine], v[:, mine], [first + n for n in mine])
        self._owners += owners
        for owner in owners:
            self._rows[owner] += 1

    def _attend(self, q: Tensor) -> Tensor:
        b, t, hq, _ = q.shape
        if t == 0:
            return q.new_empty(b, 0, hq, self._prefill.v.shape[3])
        held, score = (self._prefill, self._grown.held), self._score
        part = part_of(q, self.length - t, held, self._mask, score, self.implementation)
        by_row = score.with_tensors(
            {n: x.expand(b, t, hq).flatten() for n, x in score.tensors.items()}
        )

        def merge(parts: Tensor, rows: slice) -> Tensor:
            mine = by_row.of_heads(rows.start, rows.stop - rows.start)
            return merged(parts, q.dtype, mine, self.implementation)

        return combine(part, self.group, merge).unflatten(0, (b, t, hq))
