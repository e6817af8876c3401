"""What is known of torchtitan's models: which of them can be served, and what their layers see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import spmd_types as spmd
from torch import nn
from torchtitan.distributed.parallel_dims import MeshAxisName
from torchtitan.models.common.attention import FlexAttention, GQAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.gpt_oss.model import Attention as GptOssAttention
from torchtitan.models.gpt_oss.model import GptOssModel
from torchtitan.protocols.sharding import ShardingConfig

from seqpar.comm import Group
from seqpar.integrations.torchtitan.calls import InnerAttention, Window

# Their masks are causal and by document; those of gpt-oss have windows besides.
MASKS = (Decoder.get_attention_masks, GptOssModel.get_attention_masks)
# Before and behind their inner attention, rows are computed by themselves.
ATTENTIONS = (GQAttention, GptOssAttention)
INNER = (FlexAttention, VarlenAttention)
ROWS = ("q_BLNH", "k_BLNH", "v_BLNH")


def replacements(model: Any, group: Group) -> list[tuple[Any, InnerAttention]]:
    """The attention modules of a model, and what the inner attention of each becomes.

    Args:
        group: the ranks along "cp".

    Raises:
        NotImplementedError: rows may meet in ways that are not known here.
    """
    kind = type(model)
    is_known = isinstance(model, Decoder) and kind.forward is Decoder.forward
    if not is_known or kind.get_attention_masks not in MASKS:
        raise NotImplementedError(
            f"{kind.__name__} may mix tokens, or mask them, in ways that are not known here; models that "
            "are: Llama 3, Qwen 3, gpt-oss"
        )
    found = []
    for name, block in model.layers.items():
        module: Any = getattr(block, "attention", None)
        inner: Any = getattr(module, "inner_attention", None)
        if type(module) not in ATTENTIONS or type(inner) not in INNER:
            raise NotImplementedError(
                f"layer {name} attends by {type(module).__name__} with {type(inner).__name__}, which is "
                "not known here"
            )
        new = InnerAttention(group, _window(inner, model.config.layers[int(name)].attention))
        new._sharding_config = _of_own_rows(inner._sharding_config)
        found.append((module, new))
    return found


def _window(inner: nn.Module, config: Any) -> Window:
    """The window of a layer, as `seqpar.Mask` has it."""
    if isinstance(inner, VarlenAttention):
        left, right = inner.window_size
        if right != 0:
            raise NotImplementedError(f"attention that is not causal: {inner.window_size=}")
        return None if left < 0 else (left, 0)
    size = getattr(config, "sliding_window_size", None)
    return None if size is None else (size - 1, 0)


def _of_own_rows(config: ShardingConfig | None) -> ShardingConfig | None:
    """The sharding of inner attention, without the gather of keys and values along "cp".

    Raises:
        NotImplementedError: it is not given this rank's rows.
    """
    if config is None:
        return None
    given = config.in_src_shardings or {}
    if any(
        name not in given or given[name].per_axis_spmd_types()[MeshAxisName.CP] != spmd.S(1)
        for name in ROWS
    ):
        raise NotImplementedError(f"inner attention that is not given own rows: {given}")
    own = replace(config, in_dst_shardings=given)
    if config.local_map is not None:
        gradients = tuple(given[name] for name in ROWS)
        own.local_map = replace(config.local_map, in_grad_placements=gradients)
    return own
