"""Biases by relative position, for `Score(relative_bias=)`: T5's buckets, ALiBi signed or by batch entry.

Each function gives `[.. 2*reach+1]`, a number for each distance column - row from -reach to reach, and is
differentiable::

    from seqpar import Score, biases

    Score(scale=1.0, relative_bias=biases.t5(layer.relative_attention_bias.weight))
    Score(relative_bias=biases.signed_alibi(slopes, length))      # slopes [hq] or [b hq]
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqpar_kernels.integers import is_integer


def t5(
    weight: Float[Tensor, "buckets hq"], *, bidirectional: bool = True, max_distance: int = 128
) -> Float[Tensor, "hq distances"]:
    """T5's bias, of its table of buckets: one number for each near distance, and shared ones farther away.

    Distances from `max_distance` on share the last bucket, so that is how far the bias reaches, whatever the
    length of the sequence.

    Args:
        weight: of the embedding that models call `relative_attention_bias`.
        bidirectional: whether keys ahead have buckets of their own, as in encoders; decoders are False.

    Raises:
        TypeError: weight is no floating point tensor, or max_distance no integer.
        ValueError: weight is not 2-D, or there are too few buckets or distances.

    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight must be a floating point tensor [buckets hq], got {weight!r}")
    if weight.ndim != 2:
        raise ValueError(f"weight must be [buckets hq], got {tuple(weight.shape)}")
    if not is_integer(max_distance):
        raise TypeError(f"max_distance must be an integer, got {max_distance!r}")
    distance = torch.arange(-max_distance, max_distance + 1, device=weight.device)
    buckets = _buckets(distance, weight.shape[0], max_distance, both=bidirectional)
    return weight[buckets].T


def alibi(slopes: Float[Tensor, "*b hq"], length: int) -> Float[Tensor, "*b hq distances"]:
    """-slope * |row - column|, with slopes by head, or by batch entry and head.

    Args:
        length: of the longer of queries and keys.

    Raises:
        TypeError: slopes are no floating point tensor, or length no integer.
        ValueError: slopes are neither `[hq]` nor `[b hq]`, or length is less than 1.

    Source: Press et al. 2021 (arXiv:2108.12409).
    """
    return -_slopes(slopes) * _distances(slopes, length).abs()


def signed_alibi(slopes: Float[Tensor, "*b hq"], length: int) -> Float[Tensor, "*b hq distances"]:
    """Slope * (column - row): keys ahead gain what keys behind lose. Takes and raises what `alibi` does."""
    return _slopes(slopes) * _distances(slopes, length)


def _slopes(slopes: Tensor) -> Float[Tensor, "*b hq 1"]:
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
        raise TypeError(f"slopes must be a floating point tensor [hq] or [b hq], got {slopes!r}")
    if slopes.ndim not in (1, 2):
        raise ValueError(f"slopes must be [hq] or [b hq], got {tuple(slopes.shape)}")
    return slopes.unsqueeze(-1)


def _distances(slopes: Tensor, length: int) -> Float[Tensor, "distances"]:
    if not is_integer(length):
        raise TypeError(f"length must be an integer, got {length!r}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    return torch.arange(1 - length, length, device=slopes.device, dtype=slopes.dtype)


def _buckets(
    distance: Int[Tensor, "distances"], num: int, max_distance: int, *, both: bool
) -> Int[Tensor, "distances"]:
    """The bucket of each distance: exact ones for the near half of them, then logarithmically wider."""
    num = num // 2 if both else num
    near = num // 2
    if not 0 < near < max_distance:
        raise ValueError(
            f"of {num} buckets {near} are for one distance each: there must be some, and fewer than "
            f"max_distance={max_distance}"
        )
    apart = distance.abs() if both else (-distance).clamp(min=0)
    # In float32 and in this order, as models are trained: a border may hang on the last bit.
    wider = torch.log(apart.clamp(min=1).float() / near) / math.log(max_distance / near)
    far = (near + (wider * (num - near)).long()).clamp(max=num - 1)
    ahead = (distance > 0) * num if both else 0
    return torch.where(apart < near, apart, far) + ahead
