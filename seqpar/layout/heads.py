"""Heads are dealt to ranks here: contiguous ranges of query heads and the kv heads that they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadSegment:
    """A run of a rank's query heads, and of its kv heads that serve them in equal groups. Local indices."""

    q: slice
    kv: slice


@dataclass(frozen=True)
class HeadSplit:
    """A range (start, stop) of query heads for each rank, and the range of kv heads that they need.

    Ranges of kv heads overlap where two ranks share one: it is replicated there. With more ranks
    than query heads some ranges are empty.
    """

    hq: int
    hkv: int
    q: tuple[tuple[int, int], ...]
    kv: tuple[tuple[int, int], ...]

    @property
    def replicates(self) -> bool:
        """Whether some kv head is on more than one rank."""
        return sum(stop - start for start, stop in self.kv) > self.hkv

    def num_q(self, rank: int) -> int:
        """The number of query heads that a rank takes."""
        return self.q[rank][1] - self.q[rank][0]

    def num_kv(self, rank: int) -> int:
        """The number of kv heads that a rank needs."""
        return self.kv[rank][1] - self.kv[rank][0]

    def segments(self, rank: int) -> Iterator[HeadSegment]:
        """The rank's heads in at most three runs in which every kv head serves equally many.

        A rank's first and last kv head may serve only some of their query heads here.
        """
        group = self.hq // self.hkv
        (q_start, q_stop), (kv_start, _) = self.q[rank], self.kv[rank]
        head = q_start
        while head < q_stop:
            kv = head // group
            aligned = head % group == 0 and q_stop - head >= group
            num_kv = (q_stop - head) // group if aligned else 1
            stop = head + num_kv * group if aligned else min(q_stop, (kv + 1) * group)
            yield HeadSegment(
                slice(head - q_start, stop - q_start), slice(kv - kv_start, kv - kv_start + num_kv)
            )
            head = stop


def split_heads(hq: int, hkv: int, size: int) -> HeadSplit:
    """Deals hq query heads to `size` ranks in ranges whose sizes differ by at most one.

    Raises:
        ValueError: hq is not a multiple of hkv, or a number is not positive.
    """
    if hkv < 1 or hq < 1 or size < 1 or hq % hkv:
        raise ValueError(f"hq must be a positive multiple of hkv, got {hq=} {hkv=} {size=}")
    group = hq // hkv
    short, longer = divmod(hq, size)
    starts = [r * short + min(r, longer) for r in range(size + 1)]
    q = tuple(zip(starts[:-1], starts[1:], strict=True))
    kv = tuple((a // group, (b - 1) // group + 1) if a < b else (0, 0) for a, b in q)
    return HeadSplit(hq, hkv, q, kv)
