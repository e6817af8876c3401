"""Pictures of fused layouts: the rows of a weight, one cell a head, and the ranks that own them.

Needs matplotlib (the extra `reports`), imported where it is used. No figure is shown or registered anywhere.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from seqpar.tensor_parallel.fused_qkv import Component, FusedQKV

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HUES = {"q": "Blues", "k": "Oranges", "v": "Greens"}  # shades of a hue are heads
INK = "#222222"
SMALL: dict[str, Any] = {"color": "#444444", "fontsize": 8}
INCHES_PER_CELL = 0.36
Head = tuple[Component, int]


def draw_layout(layout: FusedQKV, ranks: int, *, title: str, models: str = "") -> Figure:
    """The rows of a weight above, those that each rank holds below, and ties from head to head.

    Args:
        models: who has this layout, in words; wrapped to the figure's width.

    Raises:
        ValueError: the heads cannot be dealt to so many ranks.
    """
    dealt = layout.deal(ranks)
    shards = [
        [(c, head) for c, start, stop in layout.runs(dealt, rank) for head in range(start, stop)]
        for rank in range(ranks)
    ]
    owners: dict[Head, list[int]] = {}
    for rank, shard in enumerate(shards):
        for cell in shard:
            owners.setdefault(cell, []).append(rank)
    cells, gap = _cells(layout), 0.7
    width = max(len(cells), sum(map(len, shards)) + gap * (ranks - 1))
    figure, axes = _canvas(width, -1.6 if dealt.replicates else -0.9, 4.55, title, models)
    above = (width - len(cells)) / 2
    axes.text(above, 4.1, "rows of the fused weight, in order", **SMALL, va="bottom")
    at = {cell: above + place for place, cell in enumerate(cells)}
    for cell in cells:
        _draw_cell(axes, layout, cell, at[cell], 3)
    left = (width - sum(map(len, shards)) - gap * (ranks - 1)) / 2
    for rank, shard in enumerate(shards):
        middle = left + len(shard) / 2
        axes.text(middle, -0.25, f"rank {rank}", **SMALL, ha="center", va="top")
        for cell in shard:
            _draw_tie(axes, cell[0], at[cell], left)
            _draw_cell(axes, layout, cell, left, 0, copied=len(owners[cell]) > 1)
            left += 1
        left += gap
    if dealt.replicates:
        note = "hatched: a kv head with copies on several ranks; each takes the sum of all their gradients"
        axes.text(0, -0.95, note, **SMALL, va="top")
    return figure


def draw_overview(layouts: Mapping[str, tuple[FusedQKV, str]], *, title: str) -> Figure:
    """The rows of several weights below one another: {kind of layout: (an example, who has it)}."""
    width = max(len(_cells(layout)) for layout, _ in layouts.values())
    step = 2.5
    figure, axes = _canvas(width, -0.3, step * len(layouts) - 0.4, title, "")
    for place, (kind, (layout, models)) in enumerate(layouts.items()):
        y = step * (len(layouts) - 1 - place)
        heads = f"{layout.num_heads} query and {layout.num_kv_heads} kv heads"
        axes.text(0, y + 1.6, kind, color=INK, fontsize=10, weight="bold", va="bottom")
        axes.text(0, y + 1.12, models, **SMALL, va="bottom")
        axes.text(width, y + 1.6, heads, **SMALL, ha="right", va="bottom")
        for x, cell in enumerate(_cells(layout)):
            _draw_cell(axes, layout, cell, x, y)
    return figure


def _cells(layout: FusedQKV) -> list[Head]:
    """The heads of a weight, in the order of their rows."""
    counts = {"q": layout.num_heads, "k": layout.num_kv_heads, "v": layout.num_kv_heads}
    heads = [(c, head) for c in get_args(Component) for head in range(counts[c])]
    return sorted(heads, key=lambda cell: layout.index(*cell).start)


def _canvas(
    width: float, bottom: float, top: float, title: str, models: str
) -> tuple[Figure, Axes]:
    """A figure whose unit is a cell's side, with room from `bottom` to `top` below title and models."""
    from matplotlib.figure import Figure

    lines = textwrap.wrap(models, int(5.3 * width))
    head = 1.2 + 0.45 * len(lines)
    height = top + head - bottom
    figure = Figure(figsize=(INCHES_PER_CELL * (width + 1), INCHES_PER_CELL * height))
    figure.set_facecolor("white")
    axes = figure.add_axes((0.5 / (width + 1), 0, width / (width + 1), 1))
    axes.set(xlim=(0, width), ylim=(bottom, top + head))
    axes.set_axis_off()
    axes.text(0, top + head - 0.3, title, va="top", color=INK, fontsize=11, weight="bold")
    axes.text(0, top + head - 1.05, "\n".join(lines), va="top", color=INK, fontsize=8.5)
    return figure, axes


def _draw_cell(
    axes: Axes, layout: FusedQKV, cell: Head, x: float, y: float, *, copied: bool = False
) -> None:
    """One head, hatched where it is one of several copies."""
    from matplotlib.patches import Rectangle

    colour = _colour(layout, cell)
    hatch, behind = None, None
    if copied:
        hatch = "////"
        behind = {"boxstyle": "round,pad=0.12", "facecolor": colour, "edgecolor": "none"}
    axes.add_patch(
        Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2, hatch=hatch)
    )
    ink = "white" if sum(colour[:3]) < 1.6 else INK
    where: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5, "bbox": behind}
    axes.text(x + 0.5, y + 0.5, f"{cell[0]}{cell[1]}", color=ink, **where)


def _draw_tie(axes: Axes, component: Component, above: float, below: float) -> None:
    """A ribbon from a cell of the weight to the cell of a shard."""
    import matplotlib as mpl
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    curve = Path.CURVE4
    points = [
        (Path.MOVETO, (above, 3)),
        *((curve, (x, y)) for x, y in ((above, 2), (below, 2), (below, 1))),
        (Path.LINETO, (below + 1, 1)),
        *((curve, (x, y)) for x, y in ((below + 1, 2), (above + 1, 2), (above + 1, 3))),
    ]
    codes, vertices = zip(*points, strict=True)
    colour = mpl.colormaps[HUES[component]](0.55)
    axes.add_patch(PathPatch(Path(vertices, codes), facecolor=colour, alpha=0.25, linewidth=0))


def _colour(layout: FusedQKV, cell: Head) -> tuple[float, ...]:
    """A component's hue in a head's shade."""
    import matplotlib as mpl

    component, head = cell
    heads = layout.num_heads if component == "q" else layout.num_kv_heads
    return mpl.colormaps[HUES[component]](0.3 + 0.5 * (head + 0.5) / heads)
