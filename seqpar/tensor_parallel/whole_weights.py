"""Between a model's whole attention weights, under its names, and the shards of `ParallelAttention`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from seqpar.comm import Group, all_gather
from seqpar.tensor_parallel.check_state import check_state
from seqpar.tensor_parallel.fused_qkv import FusedQKV

if TYPE_CHECKING:
    from seqpar.tensor_parallel.layer import ParallelAttention


@dataclass(frozen=True)
class Names:
    """What a model calls the parts of its attention.

    Args:
        qkv: the fused projection, or those of q, k and v.
        out: the output projection.
        q_norm, k_norm: the norms.

    Raises:
        ValueError: qkv are not one name or three.
    """

    qkv: tuple[str, ...] = ("qkv_proj",)
    out: str = "o_proj"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"

    def __post_init__(self) -> None:
        if isinstance(self.qkv, str) or len(self.qkv) not in (1, 3):
            raise ValueError(
                f"qkv must be one name, of a fused projection, or three, got {self.qkv!r}"
            )


@dataclass(frozen=True)
class WholeWeights:
    """The names and shapes of the whole weights of one attention layer.

    Raises:
        ValueError: three weights are said to be fused in an order of their own.
    """

    names: Names
    qkv: FusedQKV
    width: int
    out_bias: bool
    out_transposed: bool

    def __post_init__(self) -> None:
        if len(self.names.qkv) == 3 and (self.qkv.order != "qkv" or self.qkv.blocks != 1):
            raise ValueError(
                f"separate weights {self.names.qkv} are not fused; declare FusedQKV.contiguous(...), got "
                f"{self.qkv}"
            )

    def shapes(self, layer: ParallelAttention) -> dict[str, tuple[int, ...]]:
        """The names and shapes of all whole weights."""
        heads = self.qkv.num_heads, self.qkv.num_kv_heads, self.qkv.num_kv_heads
        rows = [n * self.qkv.head_dim for n in heads]
        fused = [sum(rows)] if len(self.names.qkv) == 1 else rows
        shapes: dict[str, tuple[int, ...]] = {}
        for name, num in zip(self.names.qkv, fused, strict=True):
            matrix = (num, self.width)
            shapes[f"{name}.weight"] = matrix[::-1] if self.qkv.transposed else matrix
            if self.qkv.bias:
                shapes[f"{name}.bias"] = (num,)
        matrix = (self.width, rows[0])
        shapes[f"{self.names.out}.weight"] = matrix[::-1] if self.out_transposed else matrix
        if self.out_bias:
            shapes[f"{self.names.out}.bias"] = (self.width,)
        norms = {name: tuple(p.shape) for name, p in self._norms(layer)}
        return shapes | norms

    def shards(
        self, layer: ParallelAttention, state: Mapping[str, Tensor]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Every parameter of the layer and what it is to hold.

        Raises:
            ValueError: a weight is missing, unexpected, or of another shape or type.
        """
        shapes = self.shapes(layer)
        check_state(state, shapes)
        norms = dict(self._norms(layer))
        for name in shapes:
            dtype = norms[name].dtype if name in norms else layer.qkv_weight.dtype
            if state[name].dtype != dtype:
                raise ValueError(
                    f"{name} is {state[name].dtype} and the layer {dtype}; make the layer with dtype="
                )
        tp = layer.tp
        dim = 1 if self.qkv.transposed else 0

        def fused(kind: str) -> Tensor:
            parts = [state[f"{name}.{kind}"] for name in self.names.qkv]
            whole = torch.cat(parts, dim if kind == "weight" else 0)
            return self.qkv.shard(whole, tp.rank, tp.size)

        weight, out = fused("weight"), state[f"{self.names.out}.weight"]
        start, stop = (n * self.qkv.head_dim for n in layer.dealt.q[tp.rank])
        out = out.T if self.out_transposed else out
        pairs = [
            (layer.qkv_weight, weight.T if self.qkv.transposed else weight),
            (layer.out_weight, out[:, start:stop]),
        ]
        if layer.qkv_bias is not None:
            pairs.append((layer.qkv_bias, fused("bias")))
        if layer.out_bias is not None:
            pairs.append((layer.out_bias, state[f"{self.names.out}.bias"]))
        return pairs + [(p, state[name]) for name, p in norms.items()]

    @torch.no_grad()
    def whole(self, layer: ParallelAttention) -> dict[str, Tensor]:
        """The inverse of `shards`: copies, on every rank. All ranks of the layer's tp must call."""
        dealt, d = layer.dealt, self.qkv.head_dim
        rows = [sum(self.qkv.sizes(dealt, r)) for r in range(layer.tp.size)]
        columns = [dealt.num_q(r) * d for r in range(layer.tp.size)]

        def merged(shard: Tensor) -> list[Tensor]:
            shards = _gathered(shard, layer.tp, rows, 0)
            if shard.ndim == 2 and self.qkv.transposed:
                shards = [x.T for x in shards]
            whole = self.qkv.merge(shards)
            if len(self.names.qkv) == 1:
                return [whole]
            return [x.clone() for x in self.qkv.split(whole)]  # each in a storage of its own

        state: dict[str, Tensor] = {}
        for name, x in zip(self.names.qkv, merged(layer.qkv_weight), strict=True):
            state[f"{name}.weight"] = x.contiguous()
        if layer.qkv_bias is not None:
            for name, x in zip(self.names.qkv, merged(layer.qkv_bias), strict=True):
                state[f"{name}.bias"] = x.contiguous()
        out = torch.cat(_gathered(layer.out_weight, layer.tp, columns, 1), 1)
        state[f"{self.names.out}.weight"] = (out.T if self.out_transposed else out).contiguous()
        if layer.out_bias is not None:
            state[f"{self.names.out}.bias"] = layer.out_bias.detach().clone()
        return state | {name: p.detach().clone() for name, p in self._norms(layer)}

    def drawn(self, layer: ParallelAttention, generator: torch.Generator) -> dict[str, Tensor]:
        """Whole weights as torch's Linear draws them; norms as they are."""
        state: dict[str, Tensor] = {}
        norms, fan_in = dict(self._norms(layer)), self.width
        for name, shape in self.shapes(layer).items():
            if name in norms:
                state[name] = norms[name].detach()
                continue
            if name.startswith(f"{self.names.out}."):
                fan_in = self.qkv.num_heads * self.qkv.head_dim
            like = layer.qkv_weight
            x = torch.empty(shape, dtype=torch.float64).uniform_(-1, 1, generator=generator)
            state[name] = (x / math.sqrt(fan_in)).to(like)
        return state

    def _norms(self, layer: ParallelAttention) -> Iterator[tuple[str, nn.Parameter]]:
        for norm, prefix in (
            (layer.q_norm, self.names.q_norm),
            (layer.k_norm, self.names.k_norm),
        ):
            if norm is not None:
                yield from norm.named_parameters(prefix)


def _gathered(x: Tensor, group: Group, sizes: list[int], dim: int) -> list[Tensor]:
    """Every rank's shard, `sizes[rank]` long along `dim`."""
    return list(all_gather(x.detach(), group, sizes, dim).split(sizes, dim))
