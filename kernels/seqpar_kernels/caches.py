"""How large the caches of this machine's CPU are, where the system says so."""

from __future__ import annotations

from functools import cache
from pathlib import Path

LEVEL_2 = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_BYTES = {"K": 1 << 10, "M": 1 << 20}


@cache
def level_2_bytes(path: Path = LEVEL_2) -> int:
    """Bytes of the second-level cache of a core; 0 where that is not known."""
    try:
        text = path.read_text().strip()
        return int(text[:-1]) * _BYTES[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 0
