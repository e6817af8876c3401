"""What a layer says of its scores, in the terms of seqpar. What is not known is refused, not dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from seqpar.functional import cast_by_autocast
from seqpar.integrations.transformers.attention.patterns import Pattern
from seqpar.layout import Mask
from seqpar.tensor_parallel.cut import CutRecord
from seqpar_kernels import Dropout, Score

# What layers pass on that changes nothing here: lengths and positions are in the plan, the rest is for
# the model or for other attention functions.
IGNORED = frozenset({
    "position_ids", "cache_position", "use_cache", "return_dict", "output_hidden_states",
    "output_router_logits", "num_items_in_batch", "logits_to_keep", "deterministic", "target_dtype",
    "implementation", "layer_idx", "token_type_ids",
})  # fmt: skip


@dataclass(frozen=True, eq=False)
class Layer:
    """A call of the attention function: q `[b hq sl d]`, k `[b hkv sl d]`, v `[b hkv sl vd]` of this rank."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    terms: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The class of the module and its number, if it has one."""
        number = getattr(self.module, "layer_idx", None)
        return f"{type(self.module).__name__}" + ("" if number is None else f" of layer {number}")

    def rows_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as `[b sl h d]`, in the type that autocast has attention computed in."""
        q, k, v = cast_by_autocast(*(x.transpose(1, 2) for x in (self.q, self.k, self.v)))
        return q, k, v


@dataclass(frozen=True, eq=False)
class Terms:
    """Mask (without documents), score and dropout of a layer, and which of its heads is the first here.

    Args:
        chunk: see `Pattern`.
    """

    mask: Mask
    score: Score
    dropout: float
    first_head: int = 0
    chunk: int | None = None

    @staticmethod
    def of(layer: Layer, *, says_its_form: bool = True) -> Terms:
        """Reads what a layer asks for.

        Args:
            says_its_form: whether the module's own `is_causal` is to be that of its mask, as attention on one
                device goes by it where no mask is made.

        Raises:
            NotImplementedError: its mask has no pattern, or it asks for something that is not known.
            ValueError: what it says of its mask and what its mask is differ.
        """
        terms = {
            name: x for name, x in layer.terms.items() if x is not None and name not in IGNORED
        }
        pattern = _pattern(layer)
        window = terms.pop("sliding_window", pattern.window)
        if window != pattern.window:
            raise ValueError(f"the layer says sliding_window={window}, its mask is {pattern}")
        says = terms.pop("is_causal", None)
        if says is None and says_its_form:
            says = getattr(layer.module, "is_causal", None)
        if says not in (None, pattern.causal):
            raise ValueError(f"the layer says is_causal={says}, its mask is {pattern}")
        score = Score(
            scale=terms.pop("scaling", None),
            softcap=terms.pop("softcap", None),
            alibi_slopes=terms.pop("alibi_slopes", None),
            sinks=terms.pop("s_aux", None),
        )
        dropout = terms.pop("dropout", 0.0)
        first_head = terms.pop("first_head", CutRecord.of(layer.module).first_head)
        if terms.pop("output_attentions", False):
            raise NotImplementedError(
                "output_attentions: the weights of a sharded sequence are not stored; "
                "seqpar.MaterialisedAttention(...).weights gives a rank's share of them"
            )
        if terms:
            raise NotImplementedError(
                f"the layer passes {sorted(terms)} to its attention function, which seqpar does not know"
            )
        mask = Mask(pattern.causal, pattern.window)
        return Terms(mask, score, dropout, first_head, pattern.chunk)


def layer_seed(seed: int, layer: int) -> int:
    """Derives a seed for the dropout of one layer out of that of a step."""
    raw = hashlib.blake2b(f"{seed}/{layer}/0".encode(), digest_size=8).digest()
    return int.from_bytes(raw, "little") >> 1


def dropout_of(p: float, seed: int | None, layer: int | None) -> Dropout | None:
    """Makes the dropout of a layer's weights, if there is any.

    Raises:
        ValueError: there is none to drop by: no seed came with the call.
        NotImplementedError: the layer has no number of its own, so that several would drop the same.
    """
    if p == 0:
        return None
    if seed is None:
        raise ValueError(
            f"attention drops weights (p={p}), so every step needs a seed: shard(batch, seed=step) or "
            "loss(batch, seed=step), the same on every rank; or set the model's attention dropout to 0"
        )
    if layer is None:
        raise NotImplementedError(
            "attention drops weights in a module that attends more than once in a call, or is a copy of the "
            "one that was set up; set the model's attention dropout to 0"
        )
    return Dropout(p, layer_seed(seed, layer))


def _pattern(layer: Layer) -> Pattern:
    pattern = layer.mask
    if pattern is None:
        raise NotImplementedError("the layer made no mask, so what it may see is not known")
    if not isinstance(pattern, Pattern):
        what = tuple(pattern.shape) if isinstance(pattern, Tensor) else type(pattern).__name__
        raise NotImplementedError(
            f"the layer has a mask of its own, {what}; only masks that the model's own mask functions make "
            "from an attention_mask [b s] are known for the whole sequence"
        )
    if pattern.unknown is not None:
        raise NotImplementedError(
            f"its mask is {pattern.unknown}; known are causal and bidirectional masks, with or without a "
            "sliding window. Pass the model what shard returned, and no cache"
        )
    return pattern
