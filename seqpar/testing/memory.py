"""`PeakMemory`: how much the resident memory of this process grew, at its peak, inside a block."""

from __future__ import annotations

import sys
from pathlib import Path


class PeakMemory:
    """`with PeakMemory() as peak: ...`, then `peak.bytes`.

    Linux keeps a high-water mark per process and lets it be reset. It sees every allocator, which is
    what decides whether a run fits. Memory that an earlier block freed and the allocator kept is not
    counted again: measure in a fresh process.

    Raises:
        NotImplementedError: this is not Linux.
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        if sys.platform != "linux":
            raise NotImplementedError("peak memory is read from /proc, which only Linux has")
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = max(0, _status("VmHWM") - self._before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
