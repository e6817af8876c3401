"""The kernels that are compiled: for which devices, types, widths, masks and features."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget

from seqpar_kernels import Band, tuning

KIB = 1024
TARGETS = {  # family -> what the compiler calls it, and shared memory of a program in bytes
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
BANDS = {"causal": Band(None, 0), "full": Band(), "window": Band(-511, 0)}
FEATURES = ("plain", "softcap", "alibi", "dropout", "documents")


@dataclass(frozen=True)
class Case:
    """One kernel to compile."""

    target: str
    kernel: str
    dtype: str
    d: int
    mask: str
    feature: str
    tiles: tuple[int, int, int, int]
    length: int


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the arguments ask for."""
    cases = []
    for target in args.targets:
        for kernel in args.kernels:
            for dtype in args.dtype:
                size = getattr(torch, dtype).itemsize
                for d in args.d:
                    chosen = tuning.line(target, kernel, size, d)
                    tiles = args.tiles or (chosen.rows, chosen.cols, chosen.warps, chosen.stages)
                    cases += [
                        Case(target, kernel, dtype, d, mask, feature, tuple(tiles), args.length)
                        for feature in args.features
                        for mask in args.masks
                    ]
    return cases
