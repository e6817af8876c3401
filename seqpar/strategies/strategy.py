"""`Strategy`: one way to attend a sharded sequence. `registry` has all that there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from seqpar.strategies.plan import Plan


@dataclass(frozen=True)
class Order:
    """The way in which a strategy gives the same bits for any number of ranks.

    Args:
        refusal: why a plan cannot have them, as an error message, or `None`.
        cuts_sequences: whether a row's keys are met in parts: kernels must then walk tiles in a fixed order,
            and shards be cut at tile borders.
        by_default: whether bits are invariant without being asked for.
    """

    refusal: Callable[[Plan], str | None] = lambda plan: None  # noqa: ARG005
    cuts_sequences: bool = True
    by_default: bool = False


@dataclass(frozen=True)
class Strategy:
    """A way to attend, and what others must know of it.

    Args:
        attend: `(q, k, v, plan, *, with_lse=False) -> (out, lse)` of this rank's rows: q `[b sl hq d]`, k
            `[b slk hkv d]`, v `[b slk hkv vd]`, out `[b sl hq vd]`, lse `[b sl hq]`. The call has been
            checked, and all ranks make it.
        needs_grid: whether it takes the ranks in two dimensions.
        exchanges_heads: whether ranks exchange rows for heads: heads may go in chunks, and lse is given only
            where it is asked for.
        stores_scores: whether the score matrix is stored, by torch's products and not by kernels of blocks.
        order: how its bits are made invariant; `None`: they cannot be.
    """

    name: str
    attend: Callable[..., Any]
    needs_grid: bool = False
    exchanges_heads: bool = False
    stores_scores: bool = False
    order: Order | None = None
