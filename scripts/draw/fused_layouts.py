"""Draws every kind of fused weight that is known: its rows, and which rank of four owns them.

Writes one SVG for each kind and an overview, with 8 query heads.

Example: python scripts/draw/fused_layouts.py --out docs/pictures
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from seqpar.commands.arguments import parser_of
from seqpar.tensor_parallel import FusedQKV, known_models
from seqpar.tensor_parallel.draw import draw_layout, draw_overview

RANKS = 4
EXAMPLES = {
    "per head": FusedQKV.per_head(8, 1),
    "contiguous": FusedQKV.contiguous(8, 1),
    "contiguous, grouped": FusedQKV.contiguous(8, 1, 2),
    "per group": FusedQKV.per_group(8, 1, 2),
    "four blocks, q v k": FusedQKV(8, 8, 1, blocks=4, order="qvk"),
}
ORDERS = {
    "per head": "q, k and v of a head, then of the next",
    "contiguous": "all of q, all of k, all of v",
    "contiguous, grouped": "all of q, all of k, all of v, fewer kv heads",
    "per group": "the query heads of a kv head, its k, its v, then the next",
    "four blocks, q v k": "in each of four blocks q, then v, then k",
}


def models_of(kind: str) -> str:
    """Who has a kind of layout; those last that have it only without multi-query attention."""
    names = [row.name.partition(":")[0] for row in known_models() if row.kind == kind]
    plain = [name for name in names if not name.endswith(" off")]
    off = [name.rpartition(", ")[0] for name in names if name.endswith(" off")]
    return "; without multi-query: ".join(filter(None, [", ".join(plain), ", ".join(off)]))


def main() -> None:
    """Writes the pictures."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/pictures"), help="folder to write to"
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        f"fused-{kind.replace(',', '').replace(' ', '-')}": draw_layout(
            layout,
            RANKS,
            title=f"{kind.capitalize()}: {ORDERS[kind]}",
            models=models_of(kind),
        )
        for kind, layout in EXAMPLES.items()
    }
    figures["fused-overview"] = draw_overview(
        {kind: (layout, models_of(kind)) for kind, layout in EXAMPLES.items()},
        title="The same q, k and v in five orders",
    )
    # text stays text, and the same picture is the same file
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "seqpar"}):
        for name, figure in figures.items():
            path = out / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
