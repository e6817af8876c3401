"""`FusedProbe`: what attention gives for outputs of a fused projection that are put in the place of its own.

By two forward hooks that are on the module only while it runs. Not here: which outputs tell what
(`check_layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.tensor_parallel.fused_qkv import FusedQKV


class _Reached(Exception):  # noqa: N818
    """The output projection has been reached: no need to run the rest."""


@dataclass(frozen=True)
class FusedProbe:
    """Runs a module's attention on given outputs of its fused projection, as `check_layout` describes.

    Raises:
        ValueError: from every method, where the module or the call cannot be run for this.
    """

    layout: FusedQKV
    module: nn.Module
    fused: str
    out: str
    call: Callable[[], object]

    def check_weight(self) -> None:
        """Raises unless the module can be run for this, and its weight has the layout's shape."""
        layout, projection = self.layout, self.module.get_submodule(self.fused)
        if self.module.training:
            raise ValueError(
                "the module must be in eval mode: dropout changes what attention gives"
            )
        weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
        if isinstance(weight, Tensor) and (
            weight.ndim != 2 or weight.shape[layout.dim(weight)] != layout.rows
        ):
            raise ValueError(
                f"{self.fused}.weight must have {layout.rows} rows"
                f"{' in its last dimension' if layout.transposed else ''} for {layout.num_heads} query and "
                f"{layout.num_kv_heads} kv heads of {layout.head_dim}, got {tuple(weight.shape)}"
            )
        if isinstance(weight, Tensor) and layout.bias != isinstance(bias, Tensor):
            raise ValueError(
                f"the layout has bias={layout.bias}, but {self.fused} has {'none' if bias is None else 'one'}"
            )

    def count_positions(self) -> int:
        """How many positions the call has, from a run that changes nothing."""
        shapes: list[tuple[int, ...]] = []

        def look(output: Tensor) -> Tensor:
            shapes.append(tuple(output.shape))
            if not output.is_floating_point() or torch.finfo(output.dtype).bits < 32:
                raise ValueError(
                    f"{self.fused} must run in float32 or wider for changes to show, got {output.dtype}"
                )
            return output

        self._run(look)
        *leading, rows = shapes[0]
        positions = max(leading, default=1)
        if rows != self.layout.rows or positions < 3 or torch.Size(leading).numel() != positions:
            raise ValueError(
                f"{self.fused} must give [1, s, {self.layout.rows}], for one sequence of s >= 3 positions, "
                f"got {shapes[0]}"
            )
        return positions

    def attend(self, rows: Tensor) -> Tensor:
        """What attention gives for q, k and v fused, [s rows] -> [s hq d]."""
        seen = self._run(lambda output: rows.to(output).view_as(output))
        width = self.layout.num_heads * self.layout.head_dim
        if seen.numel() != len(rows) * width:
            raise ValueError(
                f"{self.out} must read {width} numbers of each of {len(rows)} positions, for "
                f"{self.layout.num_heads} query heads of {self.layout.head_dim}, got {tuple(seen.shape)}"
            )
        return seen.reshape(len(rows), self.layout.num_heads, self.layout.head_dim)

    def _run(self, replace: Callable[[Tensor], Tensor]) -> Tensor:
        replaced: list[bool] = []
        seen: list[Tensor] = []

        def put(module: nn.Module, args: Any, output: Any) -> Tensor:  # noqa: ARG001
            if not isinstance(output, Tensor):
                raise ValueError(f"{self.fused} must give one tensor, got {type(output).__name__}")
            replaced.append(True)
            return replace(output)

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
            seen.append(args[0].detach().clone())
            raise _Reached

        with self._hooked(put, look), suppress(_Reached):
            self.call()
        if len(replaced) != 1 or not seen:
            raise ValueError(
                f"the call must run {self.fused} once and then {self.out}; it ran the first "
                f"{len(replaced)} times and {'then' if seen else 'never'} the second"
            )
        return seen[0]

    @contextmanager
    def _hooked(self, put: Any, look: Any) -> Iterator[None]:
        first = self.module.get_submodule(self.fused).register_forward_hook(put)
        second = self.module.get_submodule(self.out).register_forward_pre_hook(look)
        try:
            yield
        finally:
            first.remove()
            second.remove()
