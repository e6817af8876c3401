"""`Pattern`: what a layer may see, told by the model to its mask function, without the length it told it for.

A model makes its masks from the rows that it is given, which here are a shard: their number and order
say nothing about the sequence. What holds for the whole is the *form* of the mask function, and only
that is taken. A form that is not known by name is not guessed at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from seqpar.integrations.transformers.attention.blocks import Blocks, without_blocks
from seqpar.integrations.transformers.attention.forms import A_TENSOR, filled, names_of
from seqpar.integrations.transformers.internals import mask_forms


@dataclass(frozen=True)
class Pattern:
    """The form of a layer's mask, in the terms of `seqpar.Mask`.

    Args:
        causal: whether a row sees nothing after itself.
        window: how many keys back a row sees, itself included; as many ahead when not causal.
        hidden: the padding mask that the model was given for its rows, as bytes; `None` if it hides
            nothing. It is compared with the plan, which knows that of the whole batch.
        unknown: what the mask is, in words, where it has no such form.
        chunk: of how many tokens chunks are, where a row sees its own only: from the first that is shown on.
        blocks: in which tokens see each other besides.
        length: how many rows it was made for: those of this rank, or of the whole where the model makes its
            masks before it is sharded.
    """

    causal: bool = False
    window: int | None = None
    hidden: bytes | None = None
    unknown: str | None = None
    chunk: int | None = None
    blocks: Blocks | None = None
    length: int | None = None

    ndim = 0  # it is no tensor: Falcon asks before it adds something to its mask

    @property
    def form(self) -> tuple[bool, int | None, int | None]:
        """What it is beside blocks and padding."""
        return self.causal, self.window, self.chunk

    def to(self, *_: object) -> Pattern:
        """Returns itself, since MPT casts its mask."""
        return self

    def __str__(self) -> str:
        if self.unknown is not None:
            return self.unknown
        form = "causal" if self.causal else "bidirectional"
        form += "" if self.chunk is None else f" in chunks of {self.chunk}"
        form += "" if self.blocks is None else " with blocks"
        return form if self.window is None else f"{form} with a window of {self.window}"


def pattern_mask(
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **_: object,
) -> Pattern:
    """The mask function that is registered with transformers: the pattern in place of a mask.

    It raises nothing, since it cannot know the other ranks: what is wrong is in the pattern, and the
    attention function refuses it on all ranks. Arguments are those of `transformers.masking_utils`.
    """
    if q_length != kv_length:
        return Pattern(unknown=f"a mask of {q_length} rows and {kv_length} keys (a cache of keys?)")
    hidden = None
    if attention_mask is not None:
        if attention_mask.shape[-1] != q_length:
            shape = tuple(attention_mask.shape)
            return Pattern(unknown=f"an attention_mask {shape} for {q_length} rows")
        hidden = as_bytes(attention_mask)
    function, blocks, window_of_both = without_blocks(mask_function)
    for (causal, window, chunk), form in mask_forms(local_size, A_TENSOR).items():
        if filled(function, form) is None:
            continue
        if window_of_both is None:
            return Pattern(causal, window, hidden, None, chunk, blocks, q_length)
        if causal and window is chunk is None:
            return Pattern(causal, window_of_both, hidden, None, chunk, blocks, q_length)
    names = names_of(mask_function)
    packed = " for texts that position_ids pack" if "packed_sequence_mask" in names else ""
    return Pattern(unknown=f"made of {names}{packed}")


def as_bytes(attention_mask: Tensor) -> bytes | None:
    """A padding mask as something to compare; `None` if it hides nothing."""
    seen = attention_mask.bool()
    return None if bool(seen.all()) else bytes(seen.cpu().flatten().tolist())
