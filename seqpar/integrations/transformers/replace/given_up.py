"""Parameters that are in a model no more, and the optimizers that still hold them.

Such an optimizer would leave the weights in their place as they are, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

_GIVEN_UP = WeakIdKeyDictionary()  # by parameter, what became of it, as the end of a sentence
_KNOWN = WeakIdKeyDictionary()  # optimizers that hold none, and how many parameters they had then


def give_up(parameters: Iterable[nn.Parameter], why: str) -> None:
    """Refuses the steps of optimizers that hold one of these."""
    _watch()
    _KNOWN.clear()
    for parameter in parameters:
        _GIVEN_UP[parameter] = why


def take_back(parameters: Iterable[nn.Parameter]) -> None:
    """Refuses nothing for these any more."""
    for parameter in parameters:
        _GIVEN_UP.pop(parameter, None)


@cache
def _watch() -> None:
    """Has all optimizers of the process ask, from now on."""
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, *_: object) -> None:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if len(_GIVEN_UP) == 0 or _KNOWN.get(optimizer) == count:
        return
    held = [p for group in optimizer.param_groups for p in group["params"] if p in _GIVEN_UP]
    if held:
        raise RuntimeError(
            f"{type(optimizer).__name__} holds {len(held)} parameters that {_GIVEN_UP[held[0]]}; make the "
            "optimizer anew, of the parameters that the model has now"
        )
    _KNOWN[optimizer] = count
