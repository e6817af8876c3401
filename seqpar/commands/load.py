"""How busy a machine was with other things while something was measured on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PATH = Path("/proc/stat")


@dataclass(frozen=True)
class Load:
    """CPU seconds since the machine started, over all its CPUs.

    Args:
        busy: of all processes, and what the host of a virtual machine took from it.
        passed: all of them, idle ones too.
    """

    busy: float
    passed: float

    @staticmethod
    def now() -> Load | None:
        """Read from the system, `None` where it does not say."""
        try:
            line = PATH.read_text().splitlines()[0]
        except OSError:
            return None
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
        busy, ticks_per_second = user + nice + system + steal, os.sysconf("SC_CLK_TCK")
        passed = busy + idle + iowait + irq + softirq
        return Load(busy / ticks_per_second, passed / ticks_per_second)

    def others(self, since: Load, own_seconds: float) -> float | None:
        """The share of the machine's CPUs that others used, 0 to 1, since then; `None` if time stood still.

        Args:
            own_seconds: CPU seconds that the measuring processes used in the meantime.
        """
        passed = self.passed - since.passed
        return max(0.0, (self.busy - since.busy - own_seconds) / passed) if passed else None
