"""Checks whether a group, and the tensors of a rank, fit a layout, and says so where they do not."""

from __future__ import annotations

from seqpar.layout.shards import Layout


def check_size(layout: Layout, size: int) -> None:
    """Refuses a layout of another number of ranks.

    Raises:
        ValueError: it is for more or fewer.
    """
    if layout.size != size:
        raise ValueError(
            f"the layout must be for the {size} ranks of the group, got {layout}; make it with "
            f"seqpar.{layout.kind}({layout.length}, group.size)"
        )


def check_rows(layout: Layout, rank: int, rows: int, got: str) -> None:
    """Refuses a number of rows that is not the rank's.

    Args:
        got: the names and shapes of the tensors.

    Raises:
        ValueError: the rank holds more or fewer rows.
    """
    if layout.rows[rank] != rows:
        raise ValueError(
            f"rank {rank} of {layout.size} must hold {layout.rows[rank]} of the {layout.length} positions "
            f"({layout.kind}), got {got}; shard with seqpar.shard_sequence"
        )
