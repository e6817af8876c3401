"""`Outermost`: the model as it is to be called, whatever wraps it later.

A wrapper such as DDP takes part in a step only if it is called itself: gradients of a model that is called
inside of it are not averaged, and nothing says so.
"""

from __future__ import annotations

import threading
import weakref
from copy import deepcopy
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from seqpar.gradients import REDUCES

# What calls the model inside with the arguments that it is given: by name, to import none of them.
PASS_ON = REDUCES | {"OptimizedModule"}

_ALL: weakref.WeakSet[Outermost] = weakref.WeakSet()
_LOCK = threading.RLock()  # ranks may be threads


class Outermost:
    """A model, or what has been wrapped round it of those that pass their arguments on.

    Args:
        model: is kept alive; its wrappers are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Modules that hold the model, directly or not, in the order in which they were made.
        self._around: list[weakref.ref[nn.Module]] = []
        with _LOCK:
            _ALL.add(self)

    def __call__(self) -> nn.Module:
        """The outermost module that can be called in the model's place.

        Raises:
            RuntimeError: what averages gradients is round something else that holds the model, or several
                wrappers are alive of which none is round the others.
        """
        around = self._alive()
        callable_: list[nn.Module] = [self._model]
        for module in around:
            if type(module).__name__ in PASS_ON:
                if any(child in callable_ for child in module.children()):
                    callable_.append(module)
                elif type(module).__name__ in REDUCES:
                    wrapper, inside = (type(m).__name__ for m in (module, next(module.children())))
                    raise RuntimeError(
                        f"{wrapper} is round a {inside} that holds the model, so calling the model would go "
                        f"round it: make SequenceParallel of the {wrapper}, or call it with sp.shard(batch)"
                    )
        outer = [m for m in callable_ if not any(m in list(o.children()) for o in callable_)]
        averaging = [m for m in outer if type(m).__name__ in REDUCES]
        found = averaging or outer
        if len(found) > 1:
            raise RuntimeError(
                f"the model is wrapped {len(found)} times over, in {[type(m).__name__ for m in found]}; "
                "delete all but one, or make SequenceParallel of the one that is trained"
            )
        return found[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Outermost:
        """That of the copied model, which nothing is round yet."""
        return Outermost(deepcopy(self._model, memo))

    def _alive(self) -> list[nn.Module]:
        return [module for ref in self._around if (module := ref()) is not None]

    def note(self, module: nn.Module, submodule: nn.Module | None) -> None:
        """Notes that a module has been given another one to hold."""
        if submodule is self._model or any(submodule is m for m in self._alive()):
            self._around.append(weakref.ref(module))


def _note(module: nn.Module, _: str, submodule: nn.Module | None) -> None:
    with _LOCK:
        everyone = list(_ALL)
    for outermost in everyone:
        outermost.note(module, submodule)


# Once, and never removed: torch goes through its hooks on every thread, and ranks may be threads.
register_module_module_registration_hook(_note)
