"""The picture of the ring: which k and v are where at each step, and what is computed with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from module_pictures.canvas import MARGIN, WIDTH, Canvas
from seqpar.comm import RingSchedule
from seqpar.layout import Layout, Mask, Tile, held, tiles, work, zigzag

SCORE = 8  # pixels of one score
TOP, STEP_HEIGHT = 148, 136
BAR = 6


@dataclass(frozen=True)
class Meeting:
    """The rows of a rank meet the keys of an owner, at a step."""

    step: int
    rank: int
    owner: int
    tiles: tuple[Tile, ...]

    def seen(self, layout: Layout) -> Iterator[tuple[int, range]]:
        """(position of a row, positions of the keys that it sees), for the rows of every tile."""
        rows = layout.positions(self.rank).tolist()
        for tile in self.tiles:
            for i in range(tile.rows.stop - tile.rows.start):
                cols = tile.band.columns(i, tile.cols.stop - tile.cols.start)
                keys = range(
                    tile.col + cols.start * tile.step, tile.col + cols.stop * tile.step, tile.step
                )
                yield rows[tile.rows.start + i], keys


def meetings(layout: Layout, mask: Mask) -> list[Meeting]:
    """Who meets whom, step by step, as a ring goes."""
    found = []
    for step in range(layout.size):
        for rank in range(layout.size):
            owner = RingSchedule(rank, layout.rows).owner_at(step)
            met = tiles(layout.spans[rank], layout.spans[owner], mask, *mask.layers)
            found.append(Meeting(step, rank, owner, met))
    return found


def draw_ring(size: int = 3, length: int = 12) -> Canvas:
    """A row of score matrices for each step, a column for each rank."""
    layout, mask = zigzag(length, size), Mask(causal=True)
    canvas = Canvas(
        "Ring: keys and values travel",
        f"{size} ranks hold {length} tokens in a zigzag. In {size} steps each rank meets the keys and "
        "values of all ranks, which travel from neighbour to neighbour.",
    )
    canvas.words(
        MARGIN, 49, f"P = {size} ranks, {length} tokens, zigzag layout, causal", look="quiet"
    )
    canvas.ranks(74, size)
    _key(canvas, 96)
    met = meetings(layout, mask)
    for meeting in met:
        _draw_meeting(canvas, layout, meeting, met)
    foot = TOP + (size - 1) * STEP_HEIGHT + length * SCORE + 22
    loads = sorted(set(work(layout, mask)))
    each = f"{loads[0]}" if len(loads) == 1 else f"{loads[0]} to {loads[-1]}"
    canvas.words(MARGIN, foot, f"Every rank has then computed its rows: {each} scores each.")
    canvas.words(MARGIN, foot + 18, "Backward goes round again, with gradients.")
    return canvas


def _key(canvas: Canvas, y: float) -> None:
    canvas.words(
        MARGIN,
        y,
        "left bar: its queries, which stay; top bar: keys and values here now",
        look="small",
    )
    canvas.words(
        MARGIN,
        y + 15,
        "bright: scores of this step; pale: done; grey: to come; arrow: sent on",
        look="small",
    )


def _corner(meeting: Meeting, layout: Layout) -> tuple[float, float]:
    side = layout.length * SCORE
    pitch = (WIDTH - 2 * MARGIN - 8) / layout.size
    return MARGIN + 8 + pitch * meeting.rank + (pitch - side) / 2, TOP + STEP_HEIGHT * meeting.step


def _draw_meeting(canvas: Canvas, layout: Layout, meeting: Meeting, met: list[Meeting]) -> None:
    x, y = _corner(meeting, layout)
    side = layout.length * SCORE
    if meeting.rank == 0:
        canvas.words(
            MARGIN, y - 16, f"step {meeting.step + 1}: {_whose(meeting.step)}", look="strong"
        )
    canvas.rect(x, y, side, side, look="field")
    canvas.words(x + side - 4, y + 14, f"rank {meeting.rank}", look="quiet small", anchor="end")
    for other in met:
        if other.rank == meeting.rank:
            _draw_scores(canvas, layout, other, x, y, now=meeting.step)
    for _, span in held(layout.spans[meeting.rank]):
        canvas.rect(
            x - BAR - 2, y + span.start * SCORE, BAR, span.length * SCORE, rank=meeting.rank
        )
    for _, span in held(layout.spans[meeting.owner]):
        canvas.rect(
            x + span.start * SCORE, y - BAR - 2, span.length * SCORE, BAR, rank=meeting.owner
        )
    if meeting.step + 1 < layout.size:
        canvas.arrow(x + side + 2, y - BAR / 2 - 2, 16, 0, rank=meeting.owner)
        if meeting.rank == layout.size - 1:  # round to the first
            canvas.arrow(4, y - BAR / 2 - 2, 16, 0, rank=meeting.owner)


def _whose(step: int) -> str:
    if step == 0:
        return "own keys and values"
    return f"keys and values from {step} rank{'s' if step > 1 else ''} before"


def _draw_scores(
    canvas: Canvas, layout: Layout, meeting: Meeting, x: float, y: float, *, now: int
) -> None:
    """The scores of a meeting: done at an earlier step in a pale colour, still to come in grey."""
    rank = meeting.rank if meeting.step <= now else None
    opacity = "0.35" if meeting.step < now else "1"
    for row, keys in meeting.seen(layout):
        for key in keys:
            canvas.rect(
                x + key * SCORE, y + row * SCORE, SCORE - 1, SCORE - 1, rank=rank,
                look="faint" if rank is None else "", opacity=opacity,
            )  # fmt: skip
