"""`Canvas`: an SVG of a fixed width, the same file for the same picture, light or dark as its reader is."""

from __future__ import annotations

from xml.etree import ElementTree

WIDTH, HEIGHT = 400, 572
MARGIN = 16
RANK_COLOURS = ("#56B4E9", "#E69F00", "#2BB594", "#CC79A7")  # Okabe-Ito, the green lighter
STYLE = """
text{font:12px Helvetica,Arial,sans-serif;fill:#222}
.title{font-size:17px;font-weight:bold} .small{font-size:11px} .on{fill:#111;font-size:11px}
.paper{fill:#fff;stroke:#ccc} .field{fill:#f6f6f6} .faint{fill:#d6d6d6} .quiet{fill:#555}
.strong{font-weight:bold} .line{stroke:#555;stroke-width:2;fill:none} .head{fill:#555}
@media(prefers-color-scheme:dark){
text{fill:#eee} .on{fill:#111} .paper{fill:#161b22;stroke:#444}
.field{fill:#21262d} .faint{fill:#444c56} .quiet{fill:#b5bcc4}
.line{stroke:#b5bcc4} .head{fill:#b5bcc4}}
"""


class Canvas:
    """Shapes and words, in pixels from the top left. `look` is the name of a style above."""

    def __init__(self, title: str, description: str) -> None:
        box = f"0 0 {WIDTH} {HEIGHT}"
        self._root = ElementTree.Element(
            "svg", xmlns="http://www.w3.org/2000/svg", viewBox=box, width=str(WIDTH),
            height=str(HEIGHT), role="img",
        )  # fmt: skip
        for tag, words in (("title", title), ("desc", description), ("style", STYLE)):
            ElementTree.SubElement(self._root, tag).text = words
        self.rect(0.5, 0.5, WIDTH - 1, HEIGHT - 1, look="paper", rx="8")
        self.words(MARGIN, 28, title, look="title")

    def rect(
        self, x: float, y: float, width: float, height: float,
        *, rank: int | None = None, look: str = "", **attributes: str,
    ) -> None:  # fmt: skip
        """A rectangle in the colour of a rank, or of a look."""
        if rank is not None:
            attributes["fill"] = RANK_COLOURS[rank]
        size = {"x": x, "y": y, "width": width, "height": height}
        self._add("rect", size, look, attributes)

    def words(
        self, x: float, y: float, text: str, *, look: str = "", anchor: str = "start"
    ) -> None:
        """A line of text, whose baseline is y."""
        self._add("text", {"x": x, "y": y}, look, {"text-anchor": anchor}, text)

    def arrow(self, x: float, y: float, dx: float, dy: float, *, rank: int | None = None) -> None:
        """An arrow of so much to the right or down, its head at the end."""
        length = abs(dx + dy)
        ux, uy = dx / length, dy / length
        tip, neck = (x + dx, y + dy), (x + dx - 7 * ux, y + dy - 7 * uy)
        wings = [(neck[0] - 4.5 * s * uy, neck[1] + 4.5 * s * ux) for s in (1, -1)]
        points = " ".join(f"{_short(a)},{_short(b)}" for a, b in (tip, *wings))
        colour = {} if rank is None else {"style": f"stroke:{RANK_COLOURS[rank]}"}
        ends = {"x1": x, "y1": y, "x2": neck[0], "y2": neck[1]}
        self._add("line", ends, "line", colour)
        fill = {} if rank is None else {"style": f"fill:{RANK_COLOURS[rank]}"}
        self._add("polygon", {}, "head", {"points": points} | fill)

    def ranks(self, y: float, size: int) -> None:
        """Which colour is which rank."""
        for rank in range(size):
            self.rect(MARGIN + 74 * rank, y - 10, 12, 12, rank=rank)
            self.words(MARGIN + 17 + 74 * rank, y, f"rank {rank}")

    @property
    def svg(self) -> str:
        """The file."""
        ElementTree.indent(self._root, space=" ")
        return ElementTree.tostring(self._root, encoding="unicode") + "\n"

    def _add(
        self, tag: str, numbers: dict[str, float], look: str, others: dict[str, str], text: str = ""
    ) -> None:
        attributes = {name: _short(number) for name, number in numbers.items()} | others
        if look:
            attributes["class"] = look
        ElementTree.SubElement(self._root, tag, attributes).text = text or None


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")
