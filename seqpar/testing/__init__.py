"""Public tools to hold any attention to one-device attention: oracle, cases, error budget, worlds.

Nothing here is imported by the package itself. `drawn` needs hypothesis and `models` transformers; the
rest needs torch only.
"""

from seqpar.testing.budget import Budget
from seqpar.testing.case import NAMES, Case
from seqpar.testing.equivalence import Errors, errors_on_rank
from seqpar.testing.memory import PeakMemory
from seqpar.testing.step import Step, meet, run_step
from seqpar.testing.torchrun import TorchrunWorld
from seqpar.testing.worlds import ProcessWorld, WorldError

__all__ = [
    "NAMES",
    "Budget",
    "Case",
    "Errors",
    "PeakMemory",
    "ProcessWorld",
    "Step",
    "TorchrunWorld",
    "WorldError",
    "errors_on_rank",
    "meet",
    "run_step",
]
