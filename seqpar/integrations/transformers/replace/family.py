"""`Family`: what an attention class of transformers does around q, k and v, as data and small functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from seqpar.tensor_parallel.rotary import Angles, Rotary

Given = Mapping[str, Any]


def embedded(rotary: Rotary, _: Any, given: Given) -> Angles:
    """The angles of `position_embeddings`: (cos, sin) `[b sl dim]`, whose halves are the same."""
    cos, sin = (x[..., : rotary.dim // 2] for x in given["position_embeddings"])
    return cos, sin


@dataclass(frozen=True)
class Family:
    """An attention class.

    Functions of one argument are given the module, or what stands in for it and has its attributes.

    Args:
        classes: their names, after `transformers.models.`; classes derived from them are others.
        qkv: the projections of q, k and v, one or three.
        out: the output projection.
        when: which modules of these classes: a class may change from release to release.
        norms: of q and k, over the last dimension of heads.
        terms: what the class passes to its attention function, in the words of transformers.
        dropout: of its weights in training.
        rotary: of q and k, if any.
        angles: (cos, sin), from the rotary, the module and its arguments.
        slopes: of ALiBi, `[heads]`, in float64; `None`: it has none.
        clip: of q, k and v.
        finish: what is returned, of the projected rows, the module and its arguments.
        refused: what of a module cannot be honoured, in words.
        takes: its arguments after the first, where they are given by place.
        switches: whether transformers can switch its attention implementation.
    """

    classes: tuple[str, ...]
    qkv: tuple[str, ...]
    out: str
    when: Callable[[Any], bool] = lambda m: True  # noqa: ARG005
    norms: tuple[str, str] | None = None
    terms: Callable[[Any], dict[str, Any]] = lambda m: {"scaling": m.scaling}
    dropout: Callable[[Any], float] = lambda m: m.attention_dropout
    rotary: Callable[[Any], Rotary | None] = lambda m: None  # noqa: ARG005
    angles: Callable[[Rotary, Any, Given], Angles] = embedded
    slopes: Callable[[Any], Tensor | None] = lambda m: None  # noqa: ARG005
    clip: Callable[[Any], float | None] = lambda m: None  # noqa: ARG005
    finish: Callable[[Any, Tensor, Given], Tensor] = lambda m, y, given: y  # noqa: ARG005
    refused: Callable[[Any], str | None] = lambda m: None  # noqa: ARG005
    takes: tuple[str, ...] = ()
    switches: bool = True

    @property
    def name(self) -> str:
        """The class that the others go by."""
        return self.classes[0].rpartition(".")[2]
