"""Which tiles are fastest: candidates for the table in `seqpar_kernels.tuning`, one kernel at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kernel_race.contenders import Step, exact
from kernel_race.race import brief, deviations, median_sum, race
from kernel_race.setting import Setting, Tensors
from kernel_race.sheet import Sheet
from seqpar_kernels import Band, Block, Partial, Rows, Score, accumulation_dtype, finish
from seqpar_kernels.tuning import KERNELS, Tiles, tiles_for

PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4}  # dq and dkdv both compute the scores and dp
CANDIDATES: dict[str, list[Tiles]] = {
    "forward": [
        *(Tiles(*t) for t in product((128,), (64, 128), (4, 8), (2, 3, 4))),
        *(Tiles(*t) for t in product((64,), (64,), (4,), (2, 3))),
    ],
    "dq": [
        *(Tiles(*t) for t in product((64, 128), (32, 64), (4, 8), (2, 3))),
        Tiles(128, 128, 8, 2),
    ],
    "dkdv": [Tiles(*t) for t in product((32, 64), (64, 128), (4, 8), (2, 3))],
}


class Launch:
    """One launch with given tiles, on a problem whose results are known."""

    def __init__(
        self, kernel: str, tiles: Tiles, tensors: Tensors, rows: Rows, block: Block, known: Tensors
    ) -> None:
        q, self._k, self._v, _ = tensors
        self._kernel, self._rows, self._block, self._results = kernel, rows, block, known
        by_kernel = {name: tiles_for(name, q, self._v) for name in KERNELS} | {kernel: tiles}
        self._tiles = by_kernel["forward"], (by_kernel["dq"], by_kernel["dkdv"])
        self.forward: list[Step] = [self._forward] if kernel == "forward" else []
        self.backward: list[Step] = [] if kernel == "forward" else [self._backward]

    def _forward(self) -> None:
        from seqpar_kernels import triton_attention

        q, k, v = self._rows.q, self._k, self._v
        running = Partial.identity(q, v.shape[-1])
        triton_attention.forward(q, k, v, self._block, running, tiles=self._tiles[0])
        out, _ = finish(running, q.dtype, Score(), implementation="triton")
        self._results = out, *self._results[1:]

    def _backward(self) -> None:
        from seqpar_kernels import triton_attention

        dq, dk, dv = zeros(self._rows.q, self._k, self._v)
        into = (dq, None, None) if self._kernel == "dq" else (None, dk, dv)
        triton_attention.backward(
            self._rows, self._k, self._v, self._block, into, {}, tiles=self._tiles[1]
        )
        found = (
            old if new is None else new for old, new in zip(self._results[1:], into, strict=True)
        )
        self._results = (self._results[0], *found)

    def results(self) -> Tensors:
        """Out, dq, dk, dv: those that were not computed are the known ones."""
        return self._results


def tune(
    kernel: str, setting: Setting, candidates: Sequence[Tiles], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """A record for each candidate and the table's tiles, the fastest first, then those that fail."""
    tensors = setting.tensors(device)
    q, _, v, dout = tensors
    band = Band(upper=0) if setting.causal else Band()
    block = Block(band, Score().resolve(setting.d))
    known, lse = exact(tensors, setting.mask)
    out, lse = known[0].to(q.dtype), lse.to(accumulation_dtype(q.dtype))
    rows = Rows.of(q, out, dout, lse, implementation="reference")

    in_table = _numbers(tiles_for(kernel, q, v))
    by_name = {str(_numbers(t)): t for t in (tiles_for(kernel, q, v), *candidates)}
    makers = {
        name: partial(Launch, kernel, tiles, tensors, rows, block, known)
        for name, tiles in by_name.items()
    }
    timings = race(makers, rounds, device)
    errors = deviations({n: m for n, m in makers.items() if timings[n].error is None}, known)
    flops = setting.forward_flops * PRODUCTS[kernel] / PRODUCTS["forward"]
    records = []
    for name, tiles in by_name.items():
        timing = timings[name]
        found = errors.get(name, timing.error)
        steps = timing.forward if kernel == "forward" else timing.backward
        seconds = None if timing.error else median_sum(steps)
        records.append(
            {
                "kernel": kernel, "setting": str(setting),
                "tiles": _numbers(tiles), "is_in_table": _numbers(tiles) == in_table,
                "seconds": seconds, "tflops": None if seconds is None else flops / seconds / 1e12,
                "largest_error": max(found.values()) if isinstance(found, dict) else None,
                "error": found if isinstance(found, str) else None,
            }
        )  # fmt: skip
    return sorted(records, key=lambda r: (r["error"] is not None, r["seconds"] or 0.0))


def tune_sheet(records: Sequence[dict[str, Any]]) -> Sheet:
    """The candidates of a kernel as a table."""
    rows = []
    for r in records:
        tiles = f"Tiles({', '.join(map(str, r['tiles']))})"
        numbers = ("", "", "")
        if r["error"] is None:
            numbers = f"{1e3 * r['seconds']:.3f}", f"{r['tflops']:.0f}", f"{r['largest_error']:.1e}"
        rows.append((tiles, "now" if r["is_in_table"] else "", *numbers, brief(r["error"])))
    title = f"{records[0]['kernel']}: {records[0]['setting']}"
    return Sheet(title, ("tiles", "table", "ms", "TFLOP/s", "error", "failure"), rows, 2)


def zeros(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where gradients are summed."""
    dq, dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (q, k, v))
    return dq, dk, dv


def _numbers(tiles: Tiles) -> tuple[int, int, int, int]:
    return tiles.rows, tiles.cols, tiles.warps, tiles.stages
