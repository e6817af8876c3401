"""`Span`: an arithmetic progression of global positions, the atom of every layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """The positions start, start + step, ..., `length` of them."""

    start: int
    length: int
    step: int = 1

    @property
    def positions(self) -> range:
        """The positions, in order."""
        return range(self.start, self.start + self.length * self.step, self.step)

    @property
    def slice(self) -> slice:
        """The positions as a slice of the whole sequence."""
        return slice(self.start, self.start + self.length * self.step, self.step)


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Joins neighbouring spans where it can: the same positions in the same order, and no empty span."""
    out: list[Span] = []
    for span in spans:
        last = out[-1] if out else None
        if span.length == 0:
            continue
        if last and last.step == span.step and last.positions.stop == span.start:
            out[-1] = Span(last.start, last.length + span.length, span.step)
        else:
            out.append(span)
    return tuple(out)
