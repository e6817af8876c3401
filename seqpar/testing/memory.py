"""`PeakMemory`: how much the resident memory of this process grew, at its peak, inside a block.

`give_back_freed` keeps the heap of glibc out of what is measured.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h


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


def give_back_freed(threshold_bytes: int) -> None:
    """From now on, freed tensors of this size or more go back to the system at once, and no others.

    Linux with glibc only. It serves a process that has allocated little: what its heap has grown to, the
    process may use again and keep.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, threshold_bytes)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * threshold_bytes)  # as glibc does when it moves the other


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
