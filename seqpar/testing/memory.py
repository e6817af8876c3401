"""`PeakMemory`: how much the resident memory of this process grew, at its peak, inside a block."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


class PeakMemory:
    """`with PeakMemory() as peak: ...`, then `peak.bytes`.

    Linux keeps a high-water mark per process and lets it be reset. It sees every allocator, which is
    what decides whether a run fits. glibc is asked first to give back what it keeps of freed memory;
    what other allocators keep is not counted again, so a fresh process is the surest place.

    Raises:
        NotImplementedError: this is not Linux.
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        if sys.platform != "linux":
            raise NotImplementedError("peak memory is read from /proc, which only Linux has")
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
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
