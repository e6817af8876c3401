"""Other packages that `seqpar bench` times beside this one, where they are installed.

Each is called as its own documentation says. A peer that has no kernel for the CPU is given torch's op, the
one that everybody else here calls too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from seqpar.commands.peers import context_parallel, deep_speed, one_device, ring_flash, usp
from seqpar.commands.peers.one_device import Attend

__all__ = ["PEERS", "Attend", "Peer", "one_device"]


@dataclass(frozen=True)
class Peer:
    """An attention of another package.

    Args:
        package: what must be installed, as it is imported.
        layout: which rows a rank holds.
        make: from whether the mask is causal, to what attends over all ranks of the process.
        parts: into how many equal parts each rank's rows are cut.
        causal_only: whether it has no other mask in this layout.
        by_heads: whether ranks share the heads evenly.
    """

    package: str
    layout: str
    make: Callable[[bool], Attend]
    parts: int = 1
    causal_only: bool = False
    by_heads: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported."""
        return find_spec(self.package) is not None

    def lacks(self, length: int, heads: int, ranks: int, causal: bool) -> str | None:
        """Says what it cannot do of this, or `None`."""
        if not causal and self.causal_only:
            return "it wants a causal mask in this layout"
        if length % (self.parts * ranks):
            return f"it wants a length that {self.parts * ranks} divides"
        if self.by_heads and heads % ranks:
            return f"it wants a number of heads that {ranks} divides"
        return None


PEERS: dict[str, Peer] = {
    "deepspeed ulysses": Peer("deepspeed", "contiguous", deep_speed.ulysses, by_heads=True),
    "yunchang ulysses": Peer("yunchang", "contiguous", usp.ulysses, by_heads=True),
    "ring-flash-attn": Peer(
        "ring_flash_attn", "zigzag", ring_flash.zigzag, parts=2, causal_only=True
    ),
    "torch cp": Peer("torch", "zigzag", context_parallel.balanced, parts=2, causal_only=True),
}
