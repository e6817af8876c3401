"""`ReplacedAttention` behaves as the attention module whose place it has; `ReplacedModel` holds them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar.comm import agreed
from seqpar.integrations.transformers.attention.replacement import Handover, Replacement
from seqpar.integrations.transformers.attention.terms import Layer
from seqpar.integrations.transformers.internals import name_attention
from seqpar.integrations.transformers.replace.given_up import give_up, take_back
from seqpar.integrations.transformers.replace.original import Original
from seqpar.integrations.transformers.replace.state import REPLACED, shapes_of, whole_of
from seqpar.tensor_parallel.check_state import check_state
from seqpar.tensor_parallel.layer import ParallelAttention
from seqpar.tensor_parallel.policy import weight_paths
from seqpar.tensor_parallel.saving import guard, unguard
from seqpar.tensor_parallel.whole_model import whole_state, write_whole
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
        for name, child in original.others.items():
            self.add_module(name, child)
        q_norm, k_norm = original.norms
        out = original.out
        self.layer = ParallelAttention(
            original.qkv,
            original.width,
            tp=handover.group,
            names=Names(family.qkv, family.out, *(family.norms or ())),
            out_bias=out.bias is not None,
            out_transposed=original.out_transposed,
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


def _own(layer: ParallelAttention) -> list[nn.Parameter]:
    """The parameters of a layer that its original has not."""
    return list(layer.parameters(recurse=False))


class ReplacedModel:
    """A model whose attention was replaced. Made by `replace_attention`.

    Args:
        attention: the name of the implementation that it used before.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: PreTrainedModel,
        handover: Handover,
        originals: list[Original],
        *,
        attention: str,
    ) -> None:
        self.model, self.tp = model, handover.group
        self.replacements: list[ReplacedAttention] = []
        self._inner, self._handover, self._originals = inner, handover, originals
        self._names = tuple(model.state_dict())
        self._before = attention
        self._hooks: list[Any] = []

    def replace(self) -> None:
        """Puts the replacements in place. All ranks must call."""
        for original in self._originals:
            replacement = ReplacedAttention(original, self._handover)
            replacement.take(original)
            original.put(replacement)
            self.replacements.append(replacement)
        inner, handover = self._inner, self._handover
        self._hooks = [
            inner.register_forward_pre_hook(handover.enter, with_kwargs=True),
            inner.register_forward_hook(handover.leave, always_call=True),
        ]
        weights = [p for original in self._originals for p in original.weights]
        give_up(weights, "replace_attention has put others in the place of")
        guard(inner, REPLACED)

    def restore(self) -> None:
        """Puts the model's own attention back, with the weights as they are now. All ranks must call.

        The parameters are those of before, so optimizers of now hold others; gradients are not kept.

        Raises:
            RuntimeError: that was done already.
            ValueError: copies of a kv head differ between ranks; nothing is put back then.
            DesyncError: another rank raised one of the above.
        """
        with agreed(self.tp, operation="restore"):
            self._check_in_place()
        if any(replacement.layer.dealt.replicates for replacement in self.replacements):
            self._whole()
        for original, replacement in zip(self._originals, self.replacements, strict=False):
            replacement.give_back(original)  # fewer, where replacing failed half way
            original.put(original.module)
        for hook in self._hooks:
            hook.remove()
        take_back(p for original in self._originals for p in original.weights)
        ours = [p for replacement in self.replacements for p in _own(replacement.layer)]
        give_up(ours, "restore() has put the model's own back in the place of")
        unguard(self._inner)
        self.replacements = []
        if self._handover.switches:
            self._inner.set_attn_implementation(self._before)
        else:
            name_attention(self._inner.config, self._before)

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state as it would save it itself: whole weights, its own names and order.

        On every rank; what a policy has sharded is gathered. All ranks must call.

        Raises:
            RuntimeError: the model's own attention was put back, or weights have other names than before.
            ValueError: copies of a kv head differ between ranks.
            DesyncError: another rank raised one of the above.
        """
        with agreed(self.tp, operation="state_dict"):
            self._check_in_place()
            self._check_names()
        state = self.model.state_dict() | whole_state(self.model) | self._whole()
        return {name: state[name] for name in self._names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes its shards from the state of the whole model, which every rank gives. All ranks must call.

        Raises:
            ValueError: a name is missing or unexpected, or a shape is another. Nothing is written then.
            RuntimeError: the model's own attention was put back, or weights have other names than before.
            DesyncError: another rank raised one of the above.
        """
        with agreed(self.tp, operation="load_state_dict"):
            self._check_in_place()
            self._check_names()
            shapes = {name: tuple(x.shape) for name, x in self.model.state_dict().items()}
            shapes |= self._shapes()
            check_state(state, {name: shapes[name] for name in self._names})
        rest = dict(state)
        for original, replacement in zip(self._originals, self.replacements, strict=True):
            layer, norms = replacement.layer, original.kept
            whole = {n: rest.pop(f"{original.path}.{n}") for n in layer.weights.shapes(layer)}
            layer.load_whole({n: x.to(norms.get(n, layer.qkv_weight)) for n, x in whole.items()})
        own = set(weight_paths(self.model))
        write_whole(self.model, {name: x for name, x in rest.items() if name in own})
        buffers = {name: x for name, x in rest.items() if name not in own}
        self.model.load_state_dict(buffers, strict=False)

    def _placed(self) -> Iterator[tuple[str, ReplacedAttention]]:
        paths = (original.path for original in self._originals)
        return zip(paths, self.replacements, strict=True)

    def _whole(self) -> dict[str, Tensor]:
        """The whole weights of attention, by their names in the model."""
        return whole_of(self._placed())

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_of(self._placed())

    def _check_in_place(self) -> None:
        if not self.replacements:
            raise RuntimeError(
                f"the attention of {type(self._inner).__name__} was put back; replace it anew"
            )

    def _check_names(self) -> None:
        lost = set(self._names) - set(self.model.state_dict()) - set(self._shapes())
        if lost:
            raise RuntimeError(
                f"{min(lost)} is not in the model any more; take out first what was put into it later, such "
                "as adapters"
            )
