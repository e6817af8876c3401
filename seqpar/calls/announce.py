"""`announce`: says once at INFO, to the logger "seqpar", what a call has chosen and what it sends."""

from __future__ import annotations

import logging

import torch

from seqpar.calls import dry_run
from seqpar.calls.hints import idle_share
from seqpar.calls.shape import Shape
from seqpar.comm import Group
from seqpar.layout import Layout, Mask
from seqpar.strategies.plan import Plan

LOGGER = logging.getLogger("seqpar")

MOST = 100  # lines of a group: every batch may have a length of its own


def is_heard(group: Group) -> bool:
    """Whether this rank is to announce: the first of several, where somebody listens."""
    return LOGGER.isEnabledFor(logging.INFO) and group.rank == 0 and group.size > 1


def announce(plan: Plan, shape: Shape, device: torch.device) -> None:
    """Logs a line about a call whose implementation is chosen, unless its group has had that line.

    Boundaries of documents, seeds of dropout and where a layout is cut are not in it: they may be new in
    every step.
    """
    group, text = plan.group, _described(plan, shape, device)
    if text in group.told or len(group.told) == MOST:
        return
    group.told.add(text)
    sent = dry_run.sent(plan, shape, group.rank)
    forward, backward = (_size(count.bytes) for count in (sent.forward, sent.backward))
    saved = idle_share(plan)
    hint = f"; a zigzag layout would take about {saved:.0%} of its time off" if saved else ""
    LOGGER.info("%s; rank 0 sends %s forward, %s backward%s", text, forward, backward, hint)
    if len(group.told) == MOST:
        LOGGER.info("%d kinds of calls have been told; others of this group will not be", MOST)


def _described(plan: Plan, shape: Shape, device: torch.device) -> str:
    """The text of the line about a call, but for its bytes."""
    score, grid = plan.score, plan.grid
    dtype = str(shape.dtype).removeprefix("torch.")
    widths = f"{shape.d}" if shape.vd == shape.d else f"{shape.d}, {shape.vd} of values"
    parts = [
        _laid_out(plan.layout),
        f"keys {_laid_out(plan.keys)}" if plan.kv_layout not in (None, plan.layout) else "",
        " or ".join(dict.fromkeys(map(_visible, plan.masks))),
        f"batch {shape.batch}",
        f"{shape.hq} heads ({shape.hkv} of keys) of width {widths}",
        *score.told(shape.learns),
        *(term.told() for term in plan.terms if not term.hides),
        f"{plan.head_chunks} chunks of heads" if plan.head_chunks > 1 else "",
        "invariant bits" if plan.invariant else "",
        "with lse" if shape.with_lse else "",
        f"{plan.implementation or 'stored scores'} in {dtype} on {device.type}",
    ]
    ranks = f"{plan.group.size} ranks"
    if grid is not None:
        ranks += f", {len(grid.members)} (ring) x {len(grid.members[0])} (ulysses)"
    return f"{plan.strategy} attention over {ranks}: " + ", ".join(filter(None, parts))


def _laid_out(layout: Layout) -> str:
    return f"{layout.kind} {layout.length} positions"


def _visible(mask: Mask) -> str:
    """The mask in words."""
    parts = [
        "causal" if mask.is_causal else "full" if mask.regions is None else "",
        "with a mask_mod" if mask.mask_mod is not None else "",
        f"window {mask.window}" if mask.window is not None else "",
        mask.align or "",
        "documents" if mask.documents is not None else "",
        f"ranges of keys in {len(mask.layers)} layers" if mask.regions is not None else "",
    ]
    return " ".join(filter(None, parts))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes} bytes"
