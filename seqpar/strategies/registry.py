"""`STRATEGIES`: all strategies by name. A new one is a file of its own and a line here."""

from __future__ import annotations

from seqpar.strategies.allgather import ALLGATHER
from seqpar.strategies.materialised import MATERIALISED
from seqpar.strategies.mesh import MESH
from seqpar.strategies.ring import RING
from seqpar.strategies.strategy import Strategy
from seqpar.strategies.ulysses import HYBRID, ULYSSES

STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy for strategy in (RING, ULYSSES, ALLGATHER, MESH, HYBRID, *MATERIALISED)
}
