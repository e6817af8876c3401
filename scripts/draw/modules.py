"""Draws the two modules of the README's first screen: Ulysses, and the ring.

Everything in them is computed: who holds which rows and heads, who meets whose keys at which step,
and which scores are visible then.

Example: python scripts/draw/modules.py --out docs/pictures
"""

from __future__ import annotations

from pathlib import Path

from module_pictures.ring_picture import draw_ring
from module_pictures.ulysses_picture import draw_ulysses

from seqpar.commands.arguments import parser_of


def main() -> None:
    """Writes ulysses.svg and ring.svg."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/pictures"), help="folder to write to"
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, canvas in (("ulysses", draw_ulysses()), ("ring", draw_ring())):
        path = out / f"{name}.svg"
        path.write_text(canvas.svg, "utf-8")
        print(path)


if __name__ == "__main__":
    main()
