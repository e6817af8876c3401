"""`Replacement`: a module in place of a model's own attention; `Handover`: how a call's plan reaches it.

Models that pass their keyword arguments on to attention pass `seqpar=` too. Others pass at least their mask,
the same object to every layer: it stands for the call, also when a checkpointed layer is recomputed, however
many calls have been made since.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from seqpar.comm import Group
from seqpar.integrations.transformers.attention.patterns import Pattern
from seqpar.integrations.transformers.attention.registration import NAME, Attends, MissingPlanError
from seqpar.integrations.transformers.internals import attention_name
from seqpar.integrations.transformers.probe.findings import Findings


class Handover:
    """Takes the plan of each call of a model to the replacements in it.

    Args:
        group: the ranks that share the heads: they hold the same rows.
        switches: whether transformers itself switches the model's attention implementation.
    """

    def __init__(self, group: Group, *, switches: bool) -> None:
        self.group, self.switches = group, switches
        self.findings: Findings | None = None  # of the model while it attended by itself, too
        self._plan: Attends | None = None
        self._plans = WeakIdKeyDictionary()

    def enter(self, model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
        """Notes the plan of a call that begins.

        It is a forward pre-hook of the model, after that of `SequenceParallel`, which speaks for all ranks.

        Raises:
            MissingPlanError: the model is called without a plan.
        """
        plan = arguments(model, args, kwargs).get("seqpar")
        if plan is None or attention_name(model.config) != NAME:
            raise MissingPlanError(
                f"the attention of {type(model).__name__} was replaced: set it up with SequenceParallel and "
                "call it with model(**sp.shard(batch)), or put its own back with restore()"
            )
        self._plan = plan

    def leave(self, *_: object) -> None:
        """Forgets the plan of a call that ends, or fails: a forward hook of the model."""
        self._plan = None

    def plan_of(self, mask: Any, given: Attends | None, name: str) -> Attends:
        """Finds the plan of the call that a replacement is part of.

        Args:
            mask: that its layer was given.
            given: the plan, where the model passes it on.
            name: of the replacement.

        Raises:
            MissingPlanError: it is part of no call.
        """
        if given is not None:
            return given
        plan = (self._plans.get(mask) if isinstance(mask, Pattern) else None) or self._plan
        if plan is None:
            raise MissingPlanError(
                f"{name} stands in for attention and is part of no call of its model: call the model itself "
                "with model(**sp.shard(batch))"
            )
        if isinstance(mask, Pattern):
            self._plans[mask] = plan
        return plan

    def __deepcopy__(self, memo: dict[int, Any]) -> Handover:
        """A copy without the calls that are under way."""
        copied = memo[id(self)] = Handover(self.group, switches=self.switches)
        copied.findings = self.findings
        return copied

    def __reduce__(self) -> Any:
        """Refuses to be pickled: weights are those of a rank, and hooks hold a process together."""
        raise TypeError(
            "a model whose attention was replaced cannot be pickled: save replaced.state_dict(), and load it "
            "into a model of its class"
        )


class Replacement(nn.Module):
    """Stands for one attention module of a model. Attends by `plan.attend(Layer(...))`."""

    handover: Handover


def handover_of(model: nn.Module) -> Handover | None:
    """Finds the handover of the replacements in a model, if there are any.

    Raises:
        ValueError: there are several.
    """
    found = {id(m.handover): m.handover for m in model.modules() if isinstance(m, Replacement)}
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} had its attention replaced {len(found)} times; restore() all but one"
        )
    return next(iter(found.values()), None)


def arguments(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Names what a call of a model gives it."""
    signature = inspect.signature(model.forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    # Those that it names none by, whatever their own name is: not all call them kwargs.
    others = [n for n, p in signature.parameters.items() if p.kind == p.VAR_KEYWORD]
    rest = given.pop(others[0], {}) if others else {}
    return {**given, **rest}
