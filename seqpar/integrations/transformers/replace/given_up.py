"""`GivenUp`: parameters that are in a model no more, and the optimizers that still hold them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary


class GivenUp:
    """Refuses the steps of optimizers that were made before parameters were given up for others.

    Such an optimizer would leave the weights in their place as they are, without a word.

    Args:
        parameters: that are in the model no more.
        why: what became of them, as the end of a sentence.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], why: str) -> None:
        self._why = why
        self._parameters = WeakIdKeyDictionary(dict.fromkeys(parameters, True))
        self._known = (
            WeakIdKeyDictionary()
        )  # optimizers, and how many parameters they had when looked at
        # All optimizers of the process ask, for good: torch has no hook removed while it calls them.
        register_optimizer_step_pre_hook(self._check)

    def __deepcopy__(self, memo: object) -> GivenUp:
        """Of a copied model no optimizer knows yet."""
        return self

    def forget(self) -> None:
        """Refuses nothing any more: the parameters are back."""
        self._parameters.clear()

    def _check(self, optimizer: Optimizer, *_: object) -> None:
        if len(self._parameters) == 0:  # or they are all gone
            return
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._known.get(optimizer) == count:
            return
        held = [
            p for group in optimizer.param_groups for p in group["params"] if p in self._parameters
        ]
        if held:
            raise RuntimeError(
                f"{type(optimizer).__name__} holds {len(held)} parameters that {self._why}; make the "
                "optimizer anew, of the parameters that the model has now"
            )
        self._known[optimizer] = count
