"""`MultiheadAttention`: attention with its projections, with the parameters of torch's own.

Projections work row by row, so each rank projects the rows that it holds; what meets rows of other ranks is
the attention module that is given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from seqpar.comm import Group, agreed
from seqpar.layout import Layout, check_mark


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` over a sharded sequence: the same parameters, names and results.

    `load_state_dict` takes what torch's module saves, and the other way round. The parameters are replicated
    over the ranks: `seqpar.sum_gradients` makes their gradients those of one device. Mask, score terms and
    dropout of the weights are those of `attention`, which wants a seed for every layer and step. Sequences
    come as `[b sl e]`, and the result is a tensor, without weights.

    Args:
        embed_dim: width `e` of queries and of the result, a multiple of num_heads.
        num_heads: query heads.
        attention: `seqpar.RingAttention(group, mask=...)`, or any other of this package.
        kv_heads: fewer heads of keys and values, each for num_heads / kv_heads query heads; torch's
            module has none. k and v then take fewer rows of `in_proj_weight` and `in_proj_bias`.
        kdim, vdim: width of keys and values, if not embed_dim; weights are then three, as in torch.
        bias: whether projections add one.
        dropout, add_bias_kv, add_zero_attn, batch_first: here only to be refused where they ask for more.

    Raises:
        ValueError: heads or widths do not fit together.
        TypeError: attention is not an attention module of this package.
        NotImplementedError: dropout, add_bias_kv, add_zero_attn, or batch_first=False.
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
        _refuse_options(dropout, add_bias_kv, add_zero_attn, batch_first)
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
        self.attention = attention
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
    ) -> Float[Tensor, "b sl e"]:
        """This rank's rows of the projected attention. All ranks must call; they agree twice.

        Args:
            key: other rows to attend; `None`: those of the query.
            value: `None`: the keys.
            layout: who holds which rows of the query.
            kv_layout: of keys and values, where they are another sequence than the queries; needs `key`.
            key_padding_mask, attn_mask, need_weights: refused, in favour of what `attention` can do.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: shapes do not fit the module, one another or the layout, or types differ.
            NotImplementedError: a mask or the weights are asked for here, or `attention` refuses.
            DesyncError: the ranks differ, or another rank raised one of the above.
        """
        with agreed(self.attention.group, operation="MultiheadAttention") as claim:  # type: ignore[arg-type]
            _refuse_masks(key_padding_mask, attn_mask, need_weights)
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
        heads = (x.unflatten(2, (-1, self.head_dim)) for x in self._project(query, key, value))
        out = self.attention(*heads, layout, kv_layout=kv_layout)
        return self.out_proj(out.flatten(2))

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


def _refuse_options(
    dropout: float, add_bias_kv: bool, add_zero_attn: bool, batch_first: bool
) -> None:
    if dropout:
        raise NotImplementedError(
            "dropout belongs to the attention module, which needs a seed: pass "
            "attention=seqpar.RingAttention(group, dropout=seqpar.Dropout(p, seed))"
        )
    if add_bias_kv or add_zero_attn:
        raise NotImplementedError(
            "add_bias_kv and add_zero_attn are not supported: a sequence has only its own keys; "
            "seqpar.Score(sinks=...) lets rows attend to nothing"
        )
    if not batch_first:
        raise NotImplementedError("batch_first=False is not supported: sequences come as [b sl e]")


def _refuse_masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, need_weights: bool
) -> None:
    if key_padding_mask is not None:
        raise NotImplementedError(
            "key_padding_mask is not supported; pack the sequences with seqpar.Mask(documents=...), or pad "
            "on the right under a causal mask"
        )
    if attn_mask is not None:
        raise NotImplementedError(
            "attn_mask is not supported; what is seen is said by the attention module: "
            "seqpar.RingAttention(group, mask=seqpar.Mask(causal=True, window=...))"
        )
    if need_weights:
        raise NotImplementedError(
            "no strategy but one has weights to return; see seqpar.MaterialisedAttention.weights"
        )
