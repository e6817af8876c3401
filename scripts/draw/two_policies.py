"""Draws tensor-parallel policies: who holds what of a layer and what is sent, and where which cut sends less.

Writes tp_policies.png and tp_crossover.png. From closed forms: needs no model and no ranks.

Example: python scripts/draw/two_policies.py docs/pictures
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from policy_pictures import crossover

from seqpar.commands.arguments import parser_of

RANKS = ("#0072B2", "#E69F00")  # Okabe-Ito
SENT, INK, FAINT = "#B2182B", "#222222", "#9a9a9a"
Q, F = 4 / 3, 8.0  # widths of q, k or v, and of the MLP, in units of the model's D
LANE, GAP, WEIGHT = 0.44, 0.35, 0.72  # of a rank's tensor, between tensors, of a weight


@dataclass(frozen=True)
class Activation:
    """Tensors side by side (name, width in D), and whether every rank holds them whole or a part."""

    tensors: tuple[tuple[str, float], ...]
    held: Literal["whole", "part"]


@dataclass(frozen=True)
class Step:
    """What leads from one activation to the next.

    Args:
        weights: their names.
        by: the features along which they are cut.
        forward: what is sent forward: words, and its width in D.
        backward: what is sent of the gradient that leaves here for the activation above.
    """

    weights: tuple[str, ...]
    by: Literal["output", "input"]
    forward: tuple[str, float] | None = None
    backward: tuple[str, float] | None = None


@dataclass(frozen=True)
class Note:
    """What a rank does on its own."""

    text: str


Row = Activation | Step | Note
STREAM, MIXED = (("residual stream, D", 1.0),), (("attention, 4/3 D", Q),)
QKV = (("q", Q), ("k", Q), ("v", Q))
GATES, HIDDEN = (("gate, 8 D", F), ("up, 8 D", F)), (("hidden, 8 D", F),)

MEGATRON: tuple[Row, ...] = (
    Activation(STREAM, "whole"),
    Step(("q", "k", "v"), "output", backward=("one all-reduce of D", 1.0)),
    Activation(QKV, "part"),
    Note("a rank attends its heads"),
    Activation(MIXED, "part"),
    Step(("out",), "input", forward=("one all-reduce of D", 1.0)),
    Activation(STREAM, "whole"),
    Step(("gate", "up"), "output", backward=("one all-reduce of D", 1.0)),
    Activation(GATES, "part"),
    Note("act(gate) * up, its part"),
    Activation(HIDDEN, "part"),
    Step(("down",), "input", forward=("one all-reduce of D", 1.0)),
    Activation(STREAM, "whole"),
)
CONTRACTED: tuple[Row, ...] = (
    Activation(STREAM, "part"),
    Step(("q", "k", "v"), "input", forward=("three all-reduces, 4 D in all", 3 * Q)),
    Activation(QKV, "whole"),
    Note("every rank attends all heads"),
    Activation(MIXED, "whole"),
    Step(("out",), "output", backward=("one all-reduce of 4/3 D", Q)),
    Activation(STREAM, "part"),
    Step(("gate", "up"), "input", forward=("two all-reduces, 16 D in all", 2 * F)),
    Activation(GATES, "whole"),
    Note("act(gate) * up, on every rank"),
    Activation(HIDDEN, "whole"),
    Step(("down",), "output", backward=("one all-reduce of 8 D", F)),
    Activation(STREAM, "part"),
)
PANELS = (
    ("Megatron", "forward 2 D, backward 2 D for each token", MEGATRON),
    ("Contracted", "forward 20 D, backward 9 1/3 D for each token: 7.3 times Megatron", CONTRACTED),
)


def draw_activation(axes: Any, y: float, row: Activation) -> float:
    """Two lanes, one a rank: filled what it holds, outlined what there is. Returns the y below."""
    from matplotlib.patches import Rectangle

    x = 0.0
    for name, width in row.tensors:
        share = width / len(RANKS) if row.held == "part" else width
        for rank, colour in enumerate(RANKS):
            bottom = y - (rank + 1) * (LANE + 0.05)
            start = x + (rank * share if row.held == "part" else 0)
            axes.add_patch(Rectangle((start, bottom), share, LANE, color=colour, lw=0))
            axes.add_patch(
                Rectangle((x, bottom), width, LANE, fill=False, ec=FAINT, lw=0.8, ls=(0, (2, 2)))
            )
        axes.text(x, y + 0.06, name, ha="left", va="bottom", fontsize=9, color=INK)
        x += width + GAP
    return y - 2 * (LANE + 0.05)


def draw_step(axes: Any, y: float, row: Step) -> float:
    """Weights with their cut to the left, what is sent to the right. Returns the y below."""
    from matplotlib.patches import FancyArrowPatch, Rectangle

    x, top = 0.0, y - 0.3
    for _ in row.weights:
        for rank, colour in enumerate(RANKS):
            half = WEIGHT / 2
            if row.by == "output":
                corner, shape = (x + rank * half, top - WEIGHT), (half, WEIGHT)
            else:
                corner, shape = (x, top - (rank + 1) * half), (WEIGHT, half)
            axes.add_patch(Rectangle(corner, *shape, fc=colour, ec="white", lw=1))
        x += WEIGHT + 0.12
    words = f"{', '.join(row.weights)}\nby {row.by}"
    axes.text(x + 0.1, top - WEIGHT / 2, words, va="center", fontsize=9, style="italic", color=INK)
    for sent, is_forward in ((row.forward, True), (row.backward, False)):
        if sent is None:
            continue
        text, width = sent
        x, middle = 6.2, top - 0.2
        axes.add_patch(
            Rectangle(
                (x, middle - 0.17), width, 0.34, lw=1.2, ec=SENT, fc=SENT if is_forward else "none"
            )
        )
        ends = (x - 0.45, top + 0.1), (x - 0.45, top - WEIGHT - 0.1)
        style = {"arrowstyle": "-|>", "mutation_scale": 13, "color": SENT, "lw": 1.6}
        axes.add_patch(FancyArrowPatch(*(ends if is_forward else ends[::-1]), **style))
        what = f"{'forward' if is_forward else 'backward'}: {text}"
        axes.text(x, middle - 0.26, what, va="top", fontsize=9, color=SENT)
    return top - WEIGHT - 0.5


def draw(path: Path) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    figure, both = plt.subplots(1, 2, figsize=(13, 9.4), layout="constrained")
    for axes, (name, total, rows) in zip(both, PANELS, strict=True):
        y = 0.0
        for row in rows:
            if isinstance(row, Activation):
                y = draw_activation(axes, y, row)
            elif isinstance(row, Step):
                y = draw_step(axes, y, row)
            else:
                axes.text(0, y - 0.36, row.text, va="center", fontsize=9, style="italic", color=INK)
                y -= 1.1
        axes.set(xlim=(-0.2, 22.9), ylim=(y - 0.1, 0.6))
        axes.set_title(f"{name}\n", fontsize=14, fontweight="bold", loc="left")
        axes.text(0, 1.004, total, transform=axes.transAxes, fontsize=10.5, color=SENT)
        axes.axis("off")
    legend = [Patch(color=colour, label=f"held by rank {n}") for n, colour in enumerate(RANKS)]
    legend += [
        Patch(fc="none", ec=FAINT, ls=(0, (2, 2)), label="the whole tensor"),
        Patch(color=SENT, label="summed over ranks, forward"),
        Patch(fc="none", ec=SENT, label="summed over ranks, backward"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=5, frameon=False, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Parses arguments and draws."""
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, help="of the pictures, which exists")
    folder = parser.parse_args().folder
    draw(folder / "tp_policies.png")
    crossover.draw(folder / "tp_crossover.png")


if __name__ == "__main__":
    main()
