"""Checks whether a group, and the tensors of a rank, fit a layout, and says so where they do not."""

from __future__ import annotations

from typing import Any

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


def check_local(x: Any, name: str, dim: int = 1) -> None:
    """Refuses a DTensor, which tells its whole length, where the rows of a rank are asked for.

    Args:
        dim: along which sequences are cut.

    Raises:
        TypeError: it is one; how its rows are given, and what their layout is, is said.
    """
    # docs/design.md: a DTensor is refused
    if hasattr(x, "full_tensor"):
        rows, layout = _rows_of(x, name, dim)
        raise TypeError(
            f"{name} is a DTensor, {tuple(x.placements)} of {tuple(x.shape)}, and must be a plain tensor of "
            f"this rank's rows: give {rows}, with {layout} as the layout; DTensor.from_local makes a DTensor "
            "of what comes back"
        )


def check_whole(x: Any, name: str, dim: int = 1) -> None:
    """Refuses a DTensor where a whole sequence is asked for, which is then cut.

    Args:
        dim: along which it is cut.

    Raises:
        TypeError: it is one; how it is given whole, and what to do if it is cut already, is said.
    """
    if hasattr(x, "full_tensor"):
        rows, layout = _rows_of(x, name, dim)
        raise TypeError(
            f"{name} is a DTensor, {tuple(x.placements)} of {tuple(x.shape)}, and must be a plain tensor, "
            f"the whole: give {name}.full_tensor(grad_placements=[Partial()]); cut already is {rows}, "
            f"of the layout {layout}"
        )


def _rows_of(x: Any, name: str, dim: int) -> tuple[str, str]:
    """How the rows of a DTensor are asked for, and how their layout is made: as code."""
    mesh, ndim = x.device_mesh, x.ndim
    if mesh.ndim != 1 or not -ndim <= dim < ndim:
        return f"{name}.to_local(), once only the sequence is cut", "seqpar.contiguous(...)"
    moved = (
        "" if x.placements[0].is_shard(dim % ndim) else f".redistribute(placements=[Shard({dim})])"
    )
    length, size = x.shape[dim], mesh.size()
    # As torch.chunk cuts: shards of one length, as long as there are rows.
    cut = f", multiple_of={-(-length // size)}" if length % size else ""
    return f"{name}{moved}.to_local()", f"seqpar.contiguous({length}, {size}{cut})"
