"""`known_layout`: the layout of a fused weight, from a model's config.

It is looked up by the exact name of the config's class and by the weight's name, in `model_rows`. What is not
there is refused, however alike its name: the wrong one of two layouts has the same shape and gives wrong
answers. Not here: proof from the model itself (`check_layout`).
"""

from __future__ import annotations

from typing import Any

from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.model_rows import OTHERS, SHIPPED, KnownModel

_DECLARE = "declare it as FusedQKV(...) and prove that by check_layout or check_split"


def known_models() -> tuple[KnownModel, ...]:
    """Every fused weight that is known, those of transformers first."""
    return SHIPPED + OTHERS


def known_layout(config: Any, weight: str) -> FusedQKV:
    """The layout of a fused weight of a model that is known.

    A class derived from a known config's is not known: its model may have changed what the config does not
    show. Where it has not, pass a config of the class that it is derived from.

    Args:
        config: the model's, as transformers or the model's own code define it.
        weight: its path, `transformer.h.0.attn.c_attn.weight`, or the end of it, with or without
            `.weight` or `.bias`.

    Raises:
        ValueError: the class or the weight is not known, the config is of none of the weight's variants or of
            several, lacks what its model reads, or has heads that its model could not have.
    """
    name = type(config).__name__
    of_class = [row for row in known_models() if name in row.configs]
    if not of_class:
        raise ValueError(_unknown_class(config, weight))
    parts = weight.split(".")
    if parts[-1] in ("weight", "bias"):
        parts.pop()
    of_weight = [row for row in of_class if row.is_weight(parts)]
    if not of_weight:
        raise ValueError(
            f"{weight!r} is not known to hold q, k and v of a {name}; {_listed(of_class)} is known to. If it "
            f"does, {_DECLARE}"
        )
    try:
        fitting = [row for row in of_weight if row.when(config)]
        if len(fitting) == 1:
            return fitting[0].read(config)
    except AttributeError as error:
        raise ValueError(f"a {name} must have what its model reads: {error}") from error
    raise ValueError(
        f"this {name} must be of one of {', '.join(row.name for row in of_weight)}; its attributes fit "
        f"{len(fitting)} of them. If you know its model, {_DECLARE}"
    )


def _unknown_class(config: Any, weight: str) -> str:
    """Why there is no layout for the weights of a class, in words."""
    known = sorted({name for row in known_models() for name in row.configs})
    bases = [base.__name__ for base in type(config).__mro__ if base.__name__ in known]
    derived = f", which is derived from {bases[0]} but may split otherwise" if bases else ""
    return (
        f"no fused weight is known of a {type(config).__name__}{derived}, so not {weight!r}. Known are those "
        f"of {', '.join(known)}. If it holds q, k and v, {_DECLARE}"
    )


def _listed(rows: list[KnownModel]) -> str:
    return ", ".join(sorted({row.weight for row in rows}))
