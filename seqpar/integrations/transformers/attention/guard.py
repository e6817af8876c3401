"""`Guard`: what a call of a model is given, looked at before it runs, so that no rank refuses alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar.comm import Group, agreed
from seqpar.data import fingerprint
from seqpar.integrations.transformers.attention.call import refuse
from seqpar.integrations.transformers.attention.registration import (
    NAME,
    MissingPlanError,
    missing_plan,
)
from seqpar.integrations.transformers.attention.replacement import arguments
from seqpar.integrations.transformers.internals import attention_name
from seqpar_kernels.torch_internals import forward_hooks

REFUSED = (  # arguments that mean something else for a shard than for the whole
    "past_key_values", "cache", "head_mask", "output_attentions", "output_router_logits", "logits_to_keep",
)  # fmt: skip


class Guard:
    """Looks at the arguments of every call of a model, before it runs; refuses on all ranks."""

    def __init__(self, group: Group, tp: Group, stack: PreTrainedModel) -> None:
        self.group, self.tp, self.stack = group, tp, stack
        self.random: Tensor | None = None  # torch's state before the call, where it may draw

    def watch(self, model: nn.Module) -> None:
        """Looks at the calls of a model from now on; an earlier guard, perhaps over other ranks, goes."""
        _remove(model)
        # docs/design.md: a record of a user's module is a hook on it
        model.register_forward_pre_hook(self, with_kwargs=True, prepend=True)
        if self.tp.size > 1:
            model.register_forward_hook(Draws(self))

    def __call__(self, model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
        """Looks at a call before it runs, as a forward pre-hook. All ranks of group and tp must call."""
        self.random = None
        if attention_name(self.stack.config) != NAME:
            return  # switched back, to run on one device
        try:
            with agreed(self.tp, operation="a call, over tp") as claim:
                self._look(model, arguments(model, args, kwargs), claim)
        except Exception as error:  # any: the others would wait
            refuse(self.group, error)
        if model.training and self.tp.size > 1:
            self.random = _random_state(model.device)

    def _look(
        self, model: PreTrainedModel, given: dict[str, Any], claim: dict[str, object]
    ) -> None:
        plan, mask = given.get("seqpar"), given.get("attention_mask")
        if plan is None:
            raise MissingPlanError(missing_plan(type(model).__name__))
        if given.get("labels") is not None:
            raise ValueError(
                "the model would shift the labels of a shard and take the mean of this rank alone; use "
                "sp.loss(batch), or inputs.labels of sp.shard(batch)"
            )
        for name in REFUSED:
            value = given.get(name)
            if isinstance(value, Tensor) or value not in (None, False, 0):
                raise NotImplementedError(
                    f"{type(model).__name__} cannot take {name} on a sharded sequence; "
                    "set_attn_implementation('sdpa') runs it on one device"
                )
        if self.tp.size > 1:  # its ranks hold the same rows
            claim["plan"] = getattr(plan, "described", None)
            claim["attention_mask"] = fingerprint(mask) if isinstance(mask, Tensor) else mask
            claim["arguments"] = sorted(n for n, x in given.items() if x is not None)


class Draws:
    """Refuses calls that drew from torch's generator, where ranks that hold the same rows drew apart."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def __call__(self, model: PreTrainedModel, *_: object) -> None:
        """Compares what a call drew, as a forward hook. All ranks of group and tp must call."""
        before, self.guard.random = self.guard.random, None
        if before is None:
            return
        drawn = not torch.equal(before, _random_state(model.device))
        words = "what dropout outside of attention draws from (torch.manual_seed alike over tp)"
        with (
            agreed(self.guard.group, operation="dropout"),
            agreed(self.guard.tp, operation="dropout, over tp") as claim,  # sp ranks draw apart
        ):
            claim[words] = fingerprint(before) if drawn else None


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _remove(model: nn.Module) -> None:
    for hooks in forward_hooks(model):
        for number in [n for n, hook in hooks.items() if isinstance(hook, (Guard, Draws))]:
            del hooks[number]
