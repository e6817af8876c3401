"""The one global thing: the name under which transformers finds seqpar's attention and mask function."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from seqpar.integrations.transformers.attention.patterns import pattern_mask
from seqpar.integrations.transformers.attention.terms import Layer

NAME = "seqpar"


class MissingPlanError(RuntimeError):
    """A model that attends over ranks was called without a plan, or does not pass it on."""


class Attends(Protocol):
    """What travels with a call as `seqpar=`."""

    def attend(self, layer: Layer) -> Tensor:
        """The rows `[b sl hq vd]` of a layer's attention."""
        ...


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    seqpar: Attends | None = None,
    **terms: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered with transformers. All ranks must call.

    Raises:
        MissingPlanError: no plan came with the call.
    """
    if seqpar is None:
        raise MissingPlanError(missing_plan(type(module).__name__))
    return seqpar.attend(Layer(module, query, key, value, attention_mask, terms)), None


def missing_plan(name: str) -> str:
    """Says what to do where a model is called without its plan."""
    return (
        f"{name} attends over ranks (attn_implementation={NAME!r}) but was called without a plan; call it "
        "with model(**sp.shard(batch)), or set_attn_implementation('sdpa') to run it on one device"
    )


def register() -> None:
    """Registers the name; again if need be.

    Raises:
        RuntimeError: something else is registered under it.
    """
    for interface, function in (
        (AttentionInterface, attention_forward),
        (AttentionMaskInterface, pattern_mask),
    ):
        known = interface().get(NAME, function)
        if known is not function:
            raise RuntimeError(f"{interface.__name__} has another function named {NAME!r}: {known}")
        interface.register(NAME, function)
