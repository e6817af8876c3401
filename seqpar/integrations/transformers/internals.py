"""What this project uses of transformers that it does not document; no other module names such a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import masking_utils

# docs/design.md: what others do not document is named once
TESTED = "5.17 to 5.24"
MASKS = (
    "causal_mask_function", "bidirectional_mask_function", "sliding_window_causal_mask_function",
    "sliding_window_bidirectional_mask_function", "chunked_causal_mask_function",
)  # fmt: skip


def attention_name(config: Any) -> str:
    """Reads the name of the attention implementation that a model of this config uses.

    Raises:
        NotImplementedError: this release keeps it elsewhere.
    """
    try:
        return config._attn_implementation
    except AttributeError:
        raise NotImplementedError(_lacks("config._attn_implementation")) from None


def name_attention(config: Any, name: str) -> None:
    """Has a model make the masks of an implementation, where the model itself cannot be switched."""
    attention_name(config)
    config._attn_implementation = name


def mask_forms(
    local_size: int | None, left_padding: Any
) -> dict[tuple[bool, int | None, int | None], Callable[..., Any]]:
    """Finds the functions that models make masks of, by (causal, window, chunk).

    Causal and window are as `seqpar.Mask` has them; a row sees its own chunk of so many tokens only.

    Two-sided windows include the distance `local_size`, one-sided ones do not:
    `abs(q - kv) <= local_size` and `kv > q - local_size`.

    Raises:
        NotImplementedError: this release has other functions.
    """
    absent = [name for name in MASKS if not hasattr(masking_utils, name)]
    if absent:
        raise NotImplementedError(_lacks(f"masking_utils.{absent[0]}"))
    make = masking_utils
    if local_size is None:
        return {
            (True, None, None): make.causal_mask_function,
            (False, None, None): make.bidirectional_mask_function,
        }
    two_sided = make.sliding_window_bidirectional_mask_function(local_size)
    return {
        (True, local_size, None): make.sliding_window_causal_mask_function(local_size),
        (False, local_size + 1, None): two_sided,
        (True, None, local_size): make.chunked_causal_mask_function(local_size, left_padding),
    }


def block_forms(
    function: Any, ids: Any, window: Any
) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Finds the functions of masks in which tokens see all of their own block besides.

    Args:
        function: of the mask beside them, ids: of the blocks of tokens, window: of both: or what stands for
            them.

    Returns:
        That of a mask with blocks beside it, and the same in a window; `None`: this release has none.
    """
    make = masking_utils
    if not hasattr(make, "blockwise_overlay"):
        return None
    beside = make.or_masks(function, make.blockwise_overlay(ids))
    return beside, make.and_masks(beside, make.sliding_window_overlay(window))


def chunks_begin_with_documents() -> bool:
    """Whether this release counts chunks of packed texts from where each text begins, and not the first."""
    return hasattr(masking_utils, "remap_positions_for_packed_sequence")


def _lacks(part: str) -> str:
    return (
        f"seqpar needs {part} of transformers, which {transformers.__version__} does not have; tested are "
        f"transformers {TESTED}"
    )
