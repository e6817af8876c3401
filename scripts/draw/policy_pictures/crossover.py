"""Closed forms, drawn: which cut of a projection sends less, and which policy for how many tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(
    str(Path(__file__).parents[2] / "measure")
)  # what is drawn is what is measured there

from gemma_policies.projection import Held, Projection

from seqpar.tensor_parallel.volume import Sizes, contracted_volume, megatron_volume

FORMS: dict[tuple[Held, Held], tuple[str, str]] = {  # how x arrives, y is wanted: colour, words
    ("whole", "part"): ("#D55E00", "x whole, y in parts"),
    ("whole", "whole"): ("#777777", "x whole, y whole"),
    ("part", "part"): ("#009E73", "x in parts, y in parts"),
    ("part", "whole"): ("#0072B2", "x in parts, y whole"),
}
# Projections of the same x are one, as wide as all of them: outputs, inputs, how x arrives, y is wanted; then
# where the name is written beside the point.
REAL: dict[str, tuple[int, int, Held, Held, tuple[int, int]]] = {
    "LoRA's A, r = 16, Gemma-7B": (16, 3072, "part", "whole", (9, -3)),
    "k, v, Falcon-7B": (128, 4544, "part", "part", (9, -5)),
    "kv down, DeepSeek-V2": (576, 5120, "part", "part", (-9, 0)),
    "down, Gemma-7B": (3072, 24576, "part", "whole", (9, -7)),
    "k, v, Llama-3-8B": (2048, 4096, "part", "part", (9, -14)),
    "out, Gemma-7B": (3072, 4096, "part", "whole", (10, -4)),
    "q, k, v, Gemma-7B": (12288, 3072, "whole", "part", (-9, 0)),
    "gate, up, Gemma-7B": (49152, 3072, "whole", "part", (-9, 0)),
}
POLICIES = {"Megatron": ("#0072B2", megatron_volume), "contracted": ("#D55E00", contracted_volume)}
WIDTH = 3072  # of Gemma-7B
UNIT = 1 << 20


def ratio(outputs: float, inputs: float, arrives: Held, wanted: Held) -> float:
    """Elements sent in a training step by input, over those by output."""
    one = Projection(round(UNIT * inputs), round(UNIT * outputs), arrives, wanted)
    return sum(one.sent("input", 2)) / sum(one.sent("output", 2))


def draw_projections(axes: Any) -> None:
    """The ratio of both cuts against the shape of the projection."""
    shapes = np.geomspace(1 / 400, 32, 200)
    for (arrives, wanted), (colour, label) in FORMS.items():
        values = [ratio(x, 1, arrives, wanted) for x in shapes]
        axes.plot(shapes, values, color=colour, lw=1.8, label=label)
    for name, (outputs, inputs, arrives, wanted, offset) in REAL.items():
        x, y = outputs / inputs, ratio(outputs, inputs, arrives, wanted)
        axes.plot(x, y, "o", color=FORMS[arrives, wanted][0], ms=6, zorder=3)
        side = "right" if offset[0] < 0 else "left"
        axes.annotate(name, (x, y), offset, textcoords="offset points", ha=side, fontsize=8.5)
    axes.axhline(1, color="black", lw=1)
    axes.axhspan(1e-3, 1, color="#0072B2", alpha=0.06, lw=0)
    axes.text(1 / 380, 1.15, "by output sends less", fontsize=9, va="bottom", style="italic")
    axes.text(1 / 380, 0.87, "by input sends less", fontsize=9, va="top", style="italic")
    axes.set(xscale="log", yscale="log", xlim=(1 / 400, 32), ylim=(1 / 250, 40),
             xlabel="outputs / inputs", ylabel="sent by input / sent by output",
             title="One projection, forward + backward")  # fmt: skip
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def draw_tokens(axes: Any, num_ranks: int = 8) -> None:
    """Elements of a training step of one layer of Gemma-7B against its tokens, and where policies meet."""
    layer = {
        "num_heads": 16,
        "num_kv_heads": 16,
        "head_dim": 256,
        "mlp": 8 * WIDTH,
        "vocabulary": 256_000,
    }
    weights = WIDTH * (4 * 4096 + 3 * 8 * WIDTH)
    # Gathered forward, gathered again and scattered backward; tokens do not matter.
    constant = 3 * weights * (num_ranks - 1) / num_ranks
    tokens = np.geomspace(64, 1 << 18, 40).round()
    axes.axhline(constant, color="#009E73", lw=1.8, label="weights sharded, gathered for use")
    for name, (colour, volume) in POLICIES.items():
        sent = [
            float(sum(volume(Sizes(int(a), WIDTH, **layer), num_ranks).sent("layers")))
            for a in tokens
        ]
        axes.plot(tokens, sent, color=colour, lw=1.8, label=name)
        meets = constant / sent[0] * tokens[0]
        axes.plot(meets, constant, "o", color=colour, ms=6, zorder=3)
        axes.annotate(f"{meets:,.0f} tokens\n= {meets / WIDTH:.1f} D", (meets, constant),
                      (-7, 9) if name == "contracted" else (9, -26), textcoords="offset points",
                      ha="right" if name == "contracted" else "left", fontsize=9)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(64, 1 << 18), xlabel="tokens of all ranks",
             ylabel="elements that a rank sends",
             title=f"One layer of Gemma-7B on {num_ranks} ranks, forward + backward")  # fmt: skip
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def draw(path: Path) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    draw_projections(left)
    draw_tokens(right)
    figure.savefig(path, dpi=110)
    plt.close(figure)
