"""Rotary positions whose frequencies follow the longest position of a call, which a shard may not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from seqpar.layout import Layout


def check_scaling(config: Any, positions: Int[Tensor, "b s"] | None, layout: Layout) -> None:
    """Refuses a layout under which some rank would take other rotary frequencies than one device.

    "longrope" takes long factors if a call has a position beyond the original length, "dynamic" scales by
    the longest position beyond it; both look at the positions that they are given.

    Raises:
        NotImplementedError: ranks would differ from the whole.
    """
    limits = dict(_limits(config))
    if not limits:
        return
    whole = torch.arange(layout.length)[None] if positions is None else positions.cpu()
    longest = [int(whole[:, layout.positions(r)].max()) + 1 for r in range(layout.size)]
    for rope, limit in limits.items():
        if rope == "dynamic" and max(longest) > limit:
            raise NotImplementedError(
                f"rope_type 'dynamic' scales by the longest position of a call; {max(longest)} positions are "
                f"beyond {limit}, and ranks would differ"
            )
        beyond = {n > limit for n in longest}
        if len(beyond) > 1:
            raise NotImplementedError(
                f"rope_type {rope!r} has other frequencies beyond position {limit}, which only some ranks "
                "hold; kind='zigzag' or 'striped' gives every rank late positions"
            )


def _limits(config: Any) -> Iterator[tuple[str, int]]:
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [r for r in ropes.values() if isinstance(r, dict)]
    for rope in nested or [ropes]:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            yield kind, rope["original_max_position_embeddings"]
        elif "dynamic" in kind:
            yield "dynamic", config.max_position_embeddings
