"""The picture of Ulysses: rows of all heads, all rows of some heads, attention, and back."""

from __future__ import annotations

from module_pictures.canvas import MARGIN, WIDTH, Canvas
from seqpar.layout import HeadSplit, Layout, Mask, contiguous, split_heads

CELL = 18, 12  # of a head, of a token
ATTENTION = 3.5  # a score
TOP, BELOW = 116, 350


def draw_ulysses(size: int = 3, length: int = 12, heads: int = 8) -> Canvas:
    """Four states of a call, clockwise from the top left, and the messages between them."""
    layout, split = contiguous(length, size), split_heads(heads, heads, size)
    counts = ", ".join(str(split.num_q(rank)) for rank in range(size))
    canvas = Canvas(
        "Ulysses: exchange rows for heads",
        f"{size} ranks hold {layout.rows} of {length} tokens; an all-to-all gives them {counts} of "
        f"{heads} heads of all tokens; they attend, and a second all-to-all brings the rows back.",
    )
    canvas.words(
        MARGIN, 49, f"P = {size} ranks, {length} tokens, {heads} heads, causal", look="quiet"
    )
    canvas.ranks(74, size)
    left, right = MARGIN, WIDTH - MARGIN - heads * CELL[0]
    _by_rows(canvas, left, TOP, layout, split, "1", "own rows, all heads", sends=True)
    under = TOP + length * CELL[1] + 14
    canvas.words(left, under, "down: tokens, across: heads", look="small")
    canvas.words(left, under + 14, "1→2: sent by rank 1 to rank 2", look="small")
    _by_heads(canvas, right, TOP, layout, split)
    between = left + heads * CELL[0] + 8, right - 10
    _messages(canvas, *between, TOP, "q, k, v", back=False)
    canvas.arrow(right + heads * CELL[0] / 2, TOP + length * CELL[1] + 10, 0, 44)
    _attention(canvas, right, BELOW, layout, split)
    _by_rows(canvas, left, BELOW, layout, split, "4", "own rows of the result", sends=False)
    _messages(canvas, *between, BELOW, "out", back=True)
    foot = BELOW + length * CELL[1]
    canvas.words(
        MARGIN, foot + 28, f"{heads} heads over {size} ranks: {counts}. Nothing need divide."
    )
    canvas.words(MARGIN, foot + 46, "Backward makes the same two exchanges, in reverse.")
    return canvas


def _caption(canvas: Canvas, x: float, y: float, number: str, words: str) -> None:
    canvas.words(x, y - 10, number, look="strong")
    canvas.words(x + 13, y - 10, words)


def _by_rows(
    canvas: Canvas, x: float, y: float, layout: Layout, split: HeadSplit,
    number: str, words: str, *, sends: bool,
) -> None:  # fmt: skip
    """Rows in the colours of their ranks, cut where heads are dealt."""
    _caption(canvas, x, y, number, words)
    for rank in range(layout.size):
        for _, rows in layout.places(rank):
            for other in range(layout.size):
                _piece(canvas, x, y, rows, slice(*split.q[other]), rank)
                if sends:
                    note = f"{rank}→{other}"
                    _note(canvas, x, y, rows, slice(*split.q[other]), note)


def _by_heads(canvas: Canvas, x: float, y: float, layout: Layout, split: HeadSplit) -> None:
    """Heads in the colours of their ranks, cut where the rows came from."""
    _caption(canvas, x, y, "2", "all rows, own heads")
    for rank in range(layout.size):
        heads = slice(*split.q[rank])
        for other in range(layout.size):
            for _, rows in layout.places(other):
                _piece(canvas, x, y, rows, heads, rank)
                _note(canvas, x, y, rows, heads, f"{other}→{rank}")


def _piece(canvas: Canvas, x: float, y: float, rows: slice, heads: slice, rank: int) -> None:
    width, height = CELL
    canvas.rect(
        x + heads.start * width, y + rows.start * height, (heads.stop - heads.start) * width - 2,
        (rows.stop - rows.start) * height - 2, rank=rank,
    )  # fmt: skip


def _note(canvas: Canvas, x: float, y: float, rows: slice, heads: slice, words: str) -> None:
    middle = x + (heads.start + heads.stop) / 2 * CELL[0] - 1
    canvas.words(
        middle, y + (rows.start + rows.stop) / 2 * CELL[1] + 3, words, look="on", anchor="middle"
    )


def _attention(canvas: Canvas, x: float, y: float, layout: Layout, split: HeadSplit) -> None:
    """The scores of every head: whole, on one rank."""
    _caption(canvas, x, y, "3", "attention, by head")
    side = ATTENTION * layout.length
    band = Mask(causal=True).layers[0].band(0, 0, 1)
    for rank in range(layout.size):
        for place in range(split.num_q(rank)):
            left, top = x + place * (side + 5), y + rank * (side + 9)
            canvas.rect(left, top, side, side, look="faint")
            for row in range(layout.length):
                seen = band.columns(row, layout.length)
                canvas.rect(
                    left + seen.start * ATTENTION, top + row * ATTENTION, len(seen) * ATTENTION,
                    ATTENTION, rank=rank,
                )  # fmt: skip


def _messages(
    canvas: Canvas, left: float, right: float, y: float, what: str, *, back: bool
) -> None:
    """The arrow of an all-to-all between the columns of the picture."""
    for words, line in ((what, 50), ("all-to-all", 64)):
        canvas.words((left + right) / 2, y + line, words, look="small", anchor="middle")
    canvas.arrow(right if back else left, y + 76, left - right if back else right - left, 0)
