"""Tile sizes of the Triton kernels, as data: one line per device family, kernel, width and element size.

The choice looks at the device, the widths and the type, never at lengths, head counts or ranks: tiles
decide the order of additions, and that must not depend on how work was split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """How a kernel is launched: tile of query rows, tile of key columns, warps, pipeline stages."""

    rows: int
    cols: int
    warps: int
    stages: int
    measured: str = "not measured"


KERNELS = ("forward", "dq", "dkdv")
L2_BYTES = {"sm_80": 40e6, "sm_86": 6e6, "sm_90": 50e6, "sm_100": 100e6, "gfx942": 4e6, "cpu": 1e6}
# Keys: family, kernel, element bytes; then the tiles for padded widths up to 64, 128 and 256.
TABLE: dict[tuple[str, str, int], tuple[Tiles, Tiles, Tiles]] = {
    ("sm_80", "forward", 2): (Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
    ("sm_80", "dq", 2): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
    ("sm_80", "dkdv", 2): (Tiles(64, 128, 8, 3), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
    ("sm_80", "forward", 4): (Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 2), Tiles(16, 16, 8, 2)),
    ("sm_80", "dq", 4): (Tiles(64, 32, 8, 2), Tiles(16, 32, 4, 2), Tiles(16, 16, 16, 2)),
    ("sm_80", "dkdv", 4): (Tiles(16, 32, 8, 2), Tiles(16, 16, 8, 2), Tiles(16, 16, 8, 2)),
    ("sm_86", "forward", 2): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 32, 8, 2)),
    ("sm_86", "dq", 2): (Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 1)),
    ("sm_86", "dkdv", 2): (Tiles(64, 128, 8, 3), Tiles(64, 64, 8, 2), Tiles(16, 64, 8, 2)),
    ("sm_86", "forward", 4): (Tiles(32, 32, 8, 2), Tiles(16, 16, 8, 2), Tiles(16, 16, 8, 2)),
    ("sm_86", "dq", 4): (Tiles(64, 32, 8, 2), Tiles(16, 16, 8, 2), Tiles(16, 16, 16, 2)),
    ("sm_86", "dkdv", 4): (Tiles(16, 32, 8, 2), Tiles(16, 16, 8, 2), Tiles(16, 16, 8, 2)),
    ("sm_90", "forward", 2): (Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
    ("sm_90", "dq", 2): (Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 32, 8, 2)),
    ("sm_90", "dkdv", 2): (Tiles(64, 128, 8, 2), Tiles(32, 128, 8, 2), Tiles(32, 32, 8, 2)),
    ("sm_90", "forward", 4): (Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 2), Tiles(32, 16, 16, 2)),
    ("sm_90", "dq", 4): (Tiles(64, 32, 8, 2), Tiles(16, 32, 8, 2), Tiles(16, 16, 16, 2)),
    ("sm_90", "dkdv", 4): (Tiles(32, 16, 4, 2), Tiles(16, 16, 8, 2), Tiles(16, 16, 8, 2)),
    ("sm_100", "forward", 2): (Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 2)),
    ("sm_100", "dq", 2): (Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
    ("sm_100", "dkdv", 2): (Tiles(64, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(32, 64, 8, 2)),
    ("sm_100", "forward", 4): (Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 2), Tiles(32, 16, 16, 2)),
    ("sm_100", "dq", 4): (Tiles(64, 32, 8, 2), Tiles(16, 32, 8, 2), Tiles(16, 16, 16, 2)),
    ("sm_100", "dkdv", 4): (Tiles(16, 32, 4, 2), Tiles(16, 16, 8, 2), Tiles(16, 16, 8, 2)),
    ("gfx942", "forward", 2): (Tiles(128, 64, 4, 2), Tiles(128, 64, 4, 1), Tiles(64, 32, 4, 1)),
    ("gfx942", "dq", 2): (Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(32, 32, 4, 1)),
    ("gfx942", "dkdv", 2): (Tiles(64, 128, 4, 1), Tiles(32, 128, 4, 1), Tiles(16, 64, 4, 1)),
    ("gfx942", "forward", 4): (Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1)),
    ("gfx942", "dq", 4): (Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(16, 16, 4, 1)),
    ("gfx942", "dkdv", 4): (Tiles(32, 64, 4, 1), Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1)),
    **{("cpu", kernel, size): (Tiles(32, 32, 1, 1),) * 3 for kernel in KERNELS for size in (2, 4)},
}


def family(device: torch.device) -> str:
    """The family whose tiles a device uses. Consumer chips have the shared memory of sm_86."""
    if device.type in ("cpu", "meta"):
        return "cpu"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major == 8 and minor > 0) or major == 12:
        return "sm_86"
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def tiles_for(kernel: str, q: torch.Tensor, v: torch.Tensor) -> Tiles:
    """The tiles of a kernel for these tensors."""
    return line(family(q.device), kernel, q.element_size(), max(q.shape[-1], v.shape[-1]))


def line(family: str, kernel: str, element_bytes: int, width: int) -> Tiles:
    """The tiles of a kernel for heads of this width."""
    return TABLE[family, kernel, element_bytes][0 if width <= 64 else 1 if width <= 128 else 2]
