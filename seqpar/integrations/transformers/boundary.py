"""`Boundary`: where a model that has other parts, such as a vision tower, hands sequences to its text layers.

Images are merged into the tokens of a whole sequence, on every rank. What the model then hands to its text
layers is sharded there, and their outputs stay so: heads work row by row. Gradients flow back through each
rank's rows into the whole embedding, so that their sum over ranks is that of one device, in towers too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from seqpar.comm import agreed
from seqpar.data import shard_sequence
from seqpar.integrations.transformers.attention.call import Call
from seqpar.integrations.transformers.attention.patterns import Pattern
from seqpar.integrations.transformers.attention.replacement import arguments
from seqpar.integrations.transformers.probe.tokens import common_arguments
from seqpar.layout import Layout
from seqpar_kernels.torch_internals import forward_hooks

# What text layers are handed of a whole sequence, and along which dimension; positions may be `[n b s]`.
SEQUENCES = {
    "input_ids": 1, "inputs_embeds": 1, "visual_pos_masks": 1, "token_type_ids": 1, "mm_token_type_ids": 1,
    "cross_attention_mask": 2, "full_text_row_masked_out_mask": 2,
}  # fmt: skip
# What they are handed of images, which no rank has a share of; its mask goes with it.
IMAGES, OF_IMAGES = "cross_attention_states", "cross_attention_mask"


# docs/design.md: a model that sees is sharded inside
class Boundary:
    """Shards what a model hands to its text layers, as a forward pre-hook of those."""

    def watch(self, stack: PreTrainedModel) -> None:
        """Shards the calls of these layers from now on; an earlier boundary goes."""
        for hooks in forward_hooks(stack):
            for number in [n for n, hook in hooks.items() if isinstance(hook, Boundary)]:
                del hooks[number]
        # docs/design.md: a record of a user's module is a hook on it
        stack.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(
        self, stack: PreTrainedModel, args: Any, kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """The rows of this rank. All ranks must call."""
        call = kwargs.get("seqpar")
        if call is None:
            return None
        given = arguments(stack, args, kwargs)
        tokens = next(given[n] for n in ("inputs_embeds", "input_ids") if given.get(n) is not None)
        mask = given.get("attention_mask")
        call.handed = mask if isinstance(mask, (Pattern, dict)) else None
        if not isinstance(call, Call):  # a trial, alone and without images
            return (), given | {"attention_mask": _handed(mask, tokens)}
        with agreed(call.plan.group, operation="the text layers") as claim:
            claim["arguments"] = sorted(n for n, x in given.items() if x is not None)
            given["attention_mask"] = _handed(mask, tokens)
            sharded = _sharded(given, tokens, call.plan.layout, call.plan.group.rank)
            call.image_mask = None if given.get(IMAGES) is None else sharded.get(OF_IMAGES)
            return (), common_arguments(stack, **sharded)


def _sharded(given: dict[str, Any], tokens: Tensor, layout: Layout, rank: int) -> dict[str, Any]:
    """This rank's part of what text layers are given.

    Raises:
        NotImplementedError: a tensor among it has no known place in the sequence.
    """
    sharded = dict(given)
    for key, dim in SEQUENCES.items():
        if given.get(key) is not None:
            sharded[key] = shard_sequence(given[key], layout, rank, dim)
    positions = given.get("position_ids")
    if positions is None:  # the layers would count what they are given
        positions = torch.arange(layout.length, device=tokens.device).expand(len(tokens), -1)
    sharded["position_ids"] = shard_sequence(positions, layout, rank, dim=positions.ndim - 1)
    mask = given["attention_mask"]  # patterns are of the whole already
    sharded["attention_mask"] = (
        mask if isinstance(mask, dict) else shard_sequence(mask, layout, rank)
    )
    if given.get("deepstack_visual_embeds") is not None:
        seen = given["visual_pos_masks"]
        number = (seen.flatten().cumsum(0) - 1).view_as(seen)
        here = shard_sequence(number, layout, rank)[shard_sequence(seen, layout, rank)]
        sharded["deepstack_visual_embeds"] = [x[here] for x in given["deepstack_visual_embeds"]]
    known = {*SEQUENCES, IMAGES, "position_ids", "attention_mask", "deepstack_visual_embeds"}
    others = {n: x for n, x in given.items() if n not in known}
    unknown = [n for n, x in others.items() if isinstance(x, (Tensor, list, tuple, dict))]
    if unknown:
        raise NotImplementedError(
            f"text layers are handed {sorted(unknown)}, and it is not known where the sequence is in them"
        )
    return sharded


def _handed(mask: Any, tokens: Tensor) -> Any:
    """The mask that text layers make theirs of: of padding `[b s]`, or one for each of their types."""
    if isinstance(mask, Pattern):
        if mask.unknown is not None:
            raise NotImplementedError(f"text layers are handed a mask that is {mask}")
        seen = None if mask.hidden is None else list(mask.hidden)
        mask = None if seen is None else tokens.new_tensor(seen, dtype=torch.long)
        mask = mask if mask is None else mask.view(tokens.shape[:2])
    if mask is None:  # without one, jumps of positions would be taken for borders of packed texts
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.long)
    return mask
