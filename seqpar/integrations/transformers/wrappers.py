"""`Outermost`: the model as it is to be called, whatever wraps it later.

A wrapper such as DDP takes part in a step only if it is called itself: gradients of a model that is called
inside of it are not averaged, and nothing says so.
"""

from __future__ import annotations

import weakref

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

# What calls the model inside with the arguments that it is given: by name, to import none of them.
PASS_ON = {"DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule"}


class Outermost:
    """A model, or what wrapped it last of those that pass their arguments on.

    Args:
        model: is kept alive; its wrappers are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wrappers: list[weakref.ref[nn.Module]] = []
        noted = weakref.WeakMethod(self._note)

        def hook(module: nn.Module, _: str, submodule: nn.Module | None) -> None:
            note = noted()
            if note is not None:
                note(module, submodule)

        weakref.finalize(self, register_module_module_registration_hook(hook).remove)

    def __call__(self) -> nn.Module:
        """The outermost module that is alive."""
        alive = [wrapper for ref in self._wrappers if (wrapper := ref()) is not None]
        return alive[-1] if alive else self._model

    def _note(self, module: nn.Module, submodule: nn.Module | None) -> None:
        if submodule is self() and type(module).__name__ in PASS_ON:
            self._wrappers.append(weakref.ref(module))
