"""`Sheet`: a table for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Sheet:
    """A table, to be printed or written down. The first `num_labels` columns are text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    num_labels: int = 1

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title)
        for n, column in enumerate(self.columns):
            table.add_column(column, justify="left" if n < self.num_labels else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> Iterator[str]:
        """Lines of Markdown."""
        yield f"**{self.title}**"
        yield ""
        yield self._line(self.columns)
        yield self._line("---" if n < self.num_labels else "---:" for n in range(len(self.columns)))
        for row in self.rows:
            yield self._line(row)

    @staticmethod
    def _line(cells: Sequence[str] | Iterator[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
