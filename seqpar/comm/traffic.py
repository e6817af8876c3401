"""`Traffic`: counts of what this rank has sent, by primitive."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Count:
    """Elements and bytes that left a rank."""

    elements: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.elements + other.elements, self.bytes + other.bytes)

    def __sub__(self, other: Count) -> Count:
        return Count(self.elements - other.elements, self.bytes - other.bytes)


@dataclass
class Traffic:
    """Running counts of one rank's sends; the few bytes of agreement are counted apart."""

    by_primitive: dict[str, Count] = field(default_factory=dict)
    agreement: Count = Count()

    def record(self, primitive: str, count: Count) -> None:
        """Adds to the count of a primitive."""
        if primitive == "agree":
            self.agreement += count
        else:
            self.by_primitive[primitive] = self.by_primitive.get(primitive, Count()) + count

    @property
    def total(self) -> Count:
        """The count of all primitives together, without agreement."""
        return sum(self.by_primitive.values(), start=Count())

    def reset(self) -> None:
        """Starts again from zero."""
        self.by_primitive.clear()
        self.agreement = Count()
