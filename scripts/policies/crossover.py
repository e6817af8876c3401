"""The plot of closed forms: which cut of a projection sends less, and which policy for how many tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from policies.projection import Held, Projection

FORMS: dict[tuple[Held, Held], tuple[str, str]] = {  # how x arrives, y is wanted: colour, words
    ("whole", "part"): ("#D55E00", "x whole, y in parts"),
    ("whole", "whole"): ("#777777", "x whole, y whole"),
    ("part", "part"): ("#009E73", "x in parts, y in parts"),
    ("part", "whole"): ("#0072B2", "x in parts, y whole"),
}
# Projections of the same x are one, as wide as all of them: outputs, inputs, how x arrives, y is wanted.
REAL: dict[str, tuple[int, int, Held, Held]] = {
    "LoRA's A, r = 16, Gemma-7B": (16, 3072, "part", "whole"),
    "k, v, Falcon-7B": (128, 4544, "part", "part"),
    "kv down, DeepSeek-V2": (576, 5120, "part", "part"),
    "down, Gemma-7B": (3072, 24576, "part", "whole"),
    "k, v, Llama-3-8B": (2048, 4096, "part", "part"),
    "out, Gemma-7B": (3072, 4096, "part", "whole"),
    "q, k, v, Gemma-7B": (12288, 3072, "whole", "part"),
    "gate, up, Gemma-7B": (49152, 3072, "whole", "part"),
}
UNIT = 1 << 12


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
    for n, (name, (outputs, inputs, arrives, wanted)) in enumerate(REAL.items()):
        x, y = outputs / inputs, ratio(outputs, inputs, arrives, wanted)
        axes.plot(x, y, "o", color=FORMS[arrives, wanted][0], ms=6, zorder=3)
        is_left = outputs > inputs or n % 2
        axes.annotate(name, (x, y), (-8, 3) if is_left else (8, -9), textcoords="offset points",
                      ha="right" if is_left else "left", fontsize=8.5)  # fmt: skip
    axes.axhline(1, color="black", lw=1)
    axes.axhspan(1e-3, 1, color="#0072B2", alpha=0.06, lw=0)
    axes.text(1 / 380, 1.15, "by output sends less", fontsize=9, va="bottom", style="italic")
    axes.text(1 / 380, 0.87, "by input sends less", fontsize=9, va="top", style="italic")
    axes.set(xscale="log", yscale="log", xlim=(1 / 400, 32), ylim=(1 / 250, 40),
             xlabel="outputs / inputs", ylabel="sent by input / sent by output",
             title="One projection, forward + backward")  # fmt: skip
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def draw_tokens(
    axes: Any, width: int, sent: Mapping[str, Callable[[int], float]], colours: Mapping[str, str]
) -> None:
    """Elements of a layer's training step against its tokens, and where two policies send as much."""
    tokens = np.geomspace(16, 1 << 19, 60).round()
    for name, elements in sent.items():
        axes.plot(
            tokens, [elements(int(a)) for a in tokens], color=colours[name], lw=1.8, label=name
        )
    constant = next(reversed(sent.values()))(1)
    for name, elements in list(sent.items())[:-1]:
        per_token = (elements(2) - elements(1)) / 1
        meets = constant / per_token
        axes.plot(meets, constant, "o", color=colours[name], ms=6, zorder=3)
        axes.annotate(f"{meets:,.0f} tokens\n= {meets / width:.1f} D", (meets, constant), (6, -28),
                      textcoords="offset points", fontsize=8.5)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tokens of the step, of all ranks",
             ylabel="elements sent per rank and layer")  # fmt: skip
    axes.legend(frameon=False, fontsize=9, loc="upper left")


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    draw_projections(left)
    D = 3072
    W = 3 * 8 * D * D + 4 * 4 / 3 * D * D
    f = 7 / 8
    draw_tokens(
        right, D,
        {"Megatron": lambda a: 8 * f * a * D, "contracted": lambda a: 2 * f * a * D * (20 + 28 / 3),
         "sharded weights": lambda _: 3 * f * W},
        {"Megatron": "#0072B2", "contracted": "#D55E00", "sharded weights": "#009E73"},
    )  # fmt: skip
    figure.savefig("/tmp/compare_scratch/c.png", dpi=110)
