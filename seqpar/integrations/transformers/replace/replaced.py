"""`ReplacedAttention`: a `ParallelAttention` that behaves as the attention module whose place it has."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqpar.integrations.transformers.attention.replacement import Handover, Replacement
from seqpar.integrations.transformers.attention.terms import Layer
from seqpar.integrations.transformers.replace.original import Original, is_transposed
from seqpar.tensor_parallel.layer import ParallelAttention
from seqpar.tensor_parallel.whole_weights import Names
from seqpar_kernels import accumulation_dtype
from seqpar_kernels.torch_internals import is_saved

ELSEWHERE = frozenset({  # arguments that are used here, or that the plan knows for the whole sequence
    "seqpar", "attention_mask", "position_embeddings", "residual", "alibi", "position_bias",
})  # fmt: skip


class ReplacedAttention(Replacement):
    """Has the heads of this rank; its other attributes, buffers and dropouts are those of the original.

    Args:
        original: the module whose place it takes.
        handover: of the model.
        device: of the parameters, which are NaN until `take`; by default the original's.

    Raises:
        ValueError: the heads cannot be dealt to the ranks.
    """

    def __init__(self, original: Original, handover: Handover, *, device: Any = None) -> None:
        super().__init__()
        self.handover, self.family = handover, original.family
        family, module = original.family, original.module
        self.code = type(module).__module__
        self.__dict__ |= {n: x for n, x in vars(module).items() if not n.startswith("_")}
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=is_saved(module, name))
        for name, child in original.others:
            self.add_module(name, child)
        q_norm, k_norm = original.norms
        out: Any = module.get_submodule(family.out)
        self.layer = ParallelAttention(
            original.qkv,
            original.width,
            tp=handover.group,
            names=Names(family.qkv, family.out, *(family.norms or ())),
            out_bias=out.bias is not None,
            out_transposed=is_transposed(out),
            rotary=family.rotary(module),
            q_norm=q_norm,
            k_norm=k_norm,
            clip=family.clip(module),
            device=out.weight.device if device is None else device,
            dtype=out.weight.dtype,
        )
        slopes = family.slopes(self)
        self._slopes = None if slopes is None else slopes[self.layer.heads_here]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """What the original returns, but for attention weights. All ranks of the mesh must call.

        Raises:
            MissingPlanError: it is called outside of a call of its model, or without a plan.
        """
        given = dict(zip(self.family.takes, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        plan = self.handover.plan_of(mask, given.get("seqpar"), type(self).__name__)
        rotary = self.layer.rotary
        angles = None if rotary is None else self.family.angles(rotary, self, given)
        q, k, v = (x.transpose(1, 2) for x in self.layer.heads(hidden_states, angles))
        terms = {name: x for name, x in given.items() if name not in ELSEWHERE}
        terms |= self.family.terms(self)
        terms["dropout"] = self.family.dropout(self) if self.training else 0.0
        terms["alibi_slopes"] = self._slopes_here(q)
        terms["first_head"] = self.layer.first_head
        out = plan.attend(Layer(self, q, k, v, mask, terms))
        return self.family.finish(self, self.layer.project(out), given), None

    def _slopes_here(self, q: Tensor) -> Tensor | None:
        if self._slopes is None:
            return None
        dtype = accumulation_dtype(q.dtype)
        return self._slopes.to(q.device, dtype)

    def take(self, original: Original) -> None:
        """Takes this rank's share of the original's weights, and empties it. All ranks must call."""
        self.layer.load_whole({n: p.detach() for n, p in original.module.named_parameters()})
        for name, learns in original.learning.items():
            parameter = getattr(self.layer, name)
            if parameter is not None:
                parameter.requires_grad_(learns)
        for parameter in original.weights:
            parameter.data = parameter.data.new_empty(0)

    def give_back(self, original: Original) -> None:
        """Fills the original with the whole weights as they are now. All ranks must call."""
        state = self.layer.whole_state()
        for name, parameter in original.module.named_parameters():
            parameter.data = state[name]
        for name, buffer in self.named_buffers(recurse=False):
            setattr(original.module, name, buffer)
        original.module.training = self.training

    def extra_repr(self) -> str:
        """What it stands for."""
        number = getattr(self, "layer_idx", None)
        return f"in place of {self.family.name}" + ("" if number is None else f" of layer {number}")
