"""`MultiheadAttention`: attention with its projections, with the parameters of torch's own.

Projections work row by row, so each rank projects the rows that it holds; what meets rows of other ranks is
the attention module that is given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seqpar.calls import agree_on_call
from seqpar.comm import Group, agreed
from seqpar.functional import attention as attend
from seqpar.layout import Layout, check_local, check_mark, check_size
from seqpar.multihead_masks import TorchMasks
from seqpar.strategies.materialised import attention_weights
from seqpar.strategies.plan import Plan
from seqpar_kernels import Dropout


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` over a sharded sequence: the same parameters, names and results.

    `load_state_dict` takes what torch's module saves, and the other way round. The parameters are replicated
    over the ranks: `seqpar.sum_gradients` makes their gradients those of one device. Mask and score terms are
    those of `attention`, and what torch's masks hide or add besides. Sequences come as `[b sl e]`; the result
    is torch's pair (out, weights), where weights are `None` unless they are asked for.

    Args:
        embed_dim: width `e` of queries and of the result, a multiple of num_heads.
        num_heads: query heads.
        attention: `seqpar.RingAttention(group, mask=...)`, or any other of this package.
        kv_heads: fewer heads of keys and values, each for num_heads / kv_heads query heads; torch's
            module has none. k and v then take fewer rows of `in_proj_weight` and `in_proj_bias`.
        kdim, vdim: width of keys and values, if not embed_dim; weights are then three, as in torch.
        bias: whether projections add one.
        dropout: of the weights while training, by a seed that torch's generator of the CPU draws in every
            forward, on the group's first rank. For seeds of your own: `attention=...(dropout=...)`.
        add_bias_kv, add_zero_attn, batch_first: here only to be refused where they ask for more.

    Raises:
        ValueError: heads or widths do not fit together, or dropout is said twice.
        TypeError: attention is not an attention module of this package.
        NotImplementedError: add_bias_kv, add_zero_attn, or batch_first=False.
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attention: nn.Module,
        *,
        kv_heads: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        batch_first: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        kdim, vdim = (embed_dim if width is None else width for width in (kdim, vdim))
        _refuse_options(add_bias_kv, add_zero_attn, batch_first)
        Dropout(dropout, 0)  # refuses what is no probability
        if not isinstance(getattr(attention, "group", None), Group):
            raise TypeError(
                f"attention must be a module such as seqpar.RingAttention(group), got {attention!r}"
            )
        if min(embed_dim, num_heads, kv_heads, kdim, vdim) < 1:
            raise ValueError(
                "widths and heads must be positive, got "
                f"{embed_dim=} {num_heads=} {kv_heads=} {kdim=} {vdim=}"
            )
        if embed_dim % num_heads or num_heads % kv_heads:
            raise ValueError(
                "embed_dim must be a multiple of num_heads and that of kv_heads, got "
                f"{embed_dim=} {num_heads=} {kv_heads=}"
            )
        self.embed_dim, self.num_heads, self.kv_heads = embed_dim, num_heads, kv_heads
        self.kdim, self.vdim, self.head_dim = kdim, vdim, embed_dim // num_heads
        if dropout and getattr(attention, "dropout", None) is not None:
            raise ValueError(
                f"attention drops weights already, {attention.dropout}, got {dropout=} too"
            )
        self.attention, self.dropout = attention, dropout
        kv_rows = kv_heads * self.head_dim
        self._rows = embed_dim, kv_rows, kv_rows
        where = {"device": device, "dtype": dtype}

        def weight(rows: int, width: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, width, **where))

        shared = kdim == vdim == embed_dim
        names = "q_proj_weight", "k_proj_weight", "v_proj_weight"
        self.register_parameter(
            "in_proj_weight", weight(sum(self._rows), embed_dim) if shared else None
        )
        for name, rows, width in zip(names, self._rows, (embed_dim, kdim, vdim), strict=True):
            self.register_parameter(name, None if shared else weight(rows, width))
        in_bias = nn.Parameter(torch.empty(sum(self._rows), **where)) if bias else None
        self.register_parameter("in_proj_bias", in_bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **where)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights as torch's module does; biases are zero."""
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if getattr(self, name) is not None:
                nn.init.xavier_uniform_(getattr(self, name))
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        query: Float[Tensor, "b sl e"],
        key: Float[Tensor, "b slk kdim"] | None = None,
        value: Float[Tensor, "b slk vdim"] | None = None,
        *,
        layout: Layout,
        kv_layout: Layout | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Float[Tensor, "b sl e"], Float[Tensor, "b *h sl skv"] | None]:
        """This rank's rows of the projected attention, and of its weights. All ranks must call.

        Args:
            key: other rows to attend; `None`: those of the query.
            value: `None`: the keys.
            layout: who holds which rows of the query.
            kv_layout: of keys and values, where they are another sequence than the queries; needs `key`.
            key_padding_mask: keys that are hidden from all rows: True, or -inf where others are 0. Of all
                keys, `[b skv]`, or of those of this rank, `[b slk]`.
            attn_mask: what is hidden (True, or -inf), or floats that are added to scores and may learn, of
                all rows or of those of this rank: `[i skv]` or `[b*hq i skv]`. Ranges are found in what it
                hides, and walked as any mask's; the rest is asked score by score, which is slow.
            need_weights: whether the weights are wanted, which `MaterialisedAttention` by rows gives. They
                are computed once more, before dropout, and without gradients.
            average_attn_weights: whether they are wanted as the mean over heads.
            is_causal: whether rows see no key after them, whatever attn_mask says.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: shapes do not fit the module, one another or the layout, or types differ.
            NotImplementedError: weights are asked for that are not stored, or `attention` refuses.
            DesyncError: the ranks differ, or another rank raised one of the above.
        """
        group = cast("Group", self.attention.group)
        with agreed(group, operation="MultiheadAttention") as claim:
            if key is None and value is not None:
                raise ValueError("values without keys cannot be attended; pass the keys, too")
            if key is None and kv_layout not in (None, layout):
                raise ValueError(
                    "without keys the query's rows are attended, which lie as its layout says; pass no "
                    f"kv_layout, or the keys it is of, got {kv_layout}"
                )
            self._check(query, key, value)
            keys = layout if kv_layout is None else kv_layout
            for name, x, of in (
                ("query", query, layout),
                ("key", key, keys),
                ("value", value, keys),
            ):
                if x is not None:
                    check_mark(x, of, name)
            claim |= {"cross attention": key is not None, "embed_dim": self.embed_dim}
            claim["heads"] = self.num_heads, self.kv_heads
            claim["weights"] = self._check_weights(need_weights, average_attn_weights)
            masks = TorchMasks(key_padding_mask, attn_mask, is_causal)
            if not masks.say_nothing:
                check_size(layout, group.size)
                check_size(keys, group.size)
                claim |= masks.check(query.shape[0], self.num_heads, layout, keys, group.rank)
            claim["dropout"] = self.dropout if self.training else 0.0
        plan = self._plan(layout, kv_layout)
        if not masks.say_nothing:
            masks = masks.gathered(plan)
            with agreed(group, operation="MultiheadAttention: masks"):
                plan = masks.applied(plan, query.shape[0])
        projected = self._project(query, key, value)
        q, k, v = (x.unflatten(2, (-1, self.head_dim)) for x in projected)
        if masks.say_nothing and not (self.dropout and self.training):
            # So that its hooks see it.
            met = self.attention(q, k, v, layout, kv_layout=kv_layout)
        else:
            met = attend(q, k, v, plan)
        out = self.out_proj(met.flatten(2))
        if not need_weights:
            return out, None
        q, k = q.detach(), k.detach()
        weights = attention_weights(q, k, agree_on_call(q, k, k, plan, operation="weights"))
        return out, weights.mean(1) if average_attn_weights else weights

    def _plan(self, layout: Layout, kv_layout: Layout | None) -> Plan:
        """The plan of the attention module, with a seed drawn for what is dropped here."""
        plan: Plan = self.attention.plan(layout, kv_layout)  # type: ignore[operator]
        if not self.dropout or not self.training:
            return plan
        # Checkpointing restores this generator, so that what is recomputed drops the same.
        seeds = plan.group.transport.gather_objects(int(torch.randint(2**62, ())))
        return replace(plan, dropout=Dropout(self.dropout, cast("int", seeds[0])))

    def _check_weights(self, need_weights: bool, average: bool) -> object:
        if not need_weights:
            return None
        if getattr(self.attention, "strategy", None) != "materialised_rows":
            raise NotImplementedError(
                "weights are given where rows of them are stored: pass "
                "attention=seqpar.MaterialisedAttention(group)"
            )
        return average

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kv_heads={self.kv_heads}"

    def _project(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> list[Tensor]:
        """q, k and v, heads side by side, in as few products as there are different inputs."""
        weight, bias, rows = self.in_proj_weight, self.in_proj_bias, list(self._rows)
        if weight is not None and key is None:
            return list(F.linear(query, weight, bias).split(rows, dim=2))
        apart = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        weights = apart if weight is None else weight.split(rows)
        biases = (None,) * 3 if bias is None else bias.split(rows)
        key = query if key is None else key
        inputs = query, key, key if value is None else value
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _check(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> None:
        key = query if key is None else key
        value = key if value is None else value
        named = {
            "query": (query, self.embed_dim),
            "key": (key, self.kdim),
            "value": (value, self.vdim),
        }
        like = self.out_proj.weight
        for name, (x, width) in named.items():
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
            check_local(x, name)
            if x.ndim != 3 or x.shape[2] != width:
                raise ValueError(f"{name} must be [b sl {width}], got {tuple(x.shape)}")
            if x.device != like.device:
                raise ValueError(f"{name} must be on {like.device}, got {x.device}")
            if x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type):
                raise ValueError(f"{name} must be {like.dtype}, as the weights, got {x.dtype}")
        if key.shape[:2] != value.shape[:2] or key.shape[0] != query.shape[0]:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, (x, _) in named.items())
            raise ValueError(
                f"batches, and the rows of keys and values, must be equal, got {shapes}"
            )


def _refuse_options(add_bias_kv: bool, add_zero_attn: bool, batch_first: bool) -> None:
    if add_bias_kv or add_zero_attn:
        raise NotImplementedError(
            "add_bias_kv and add_zero_attn are not supported: a sequence has only its own keys; "
            "seqpar.Score(sinks=...) lets rows attend to nothing"
        )
    if not batch_first:
        raise NotImplementedError("batch_first=False is not supported: sequences come as [b sl e]")
