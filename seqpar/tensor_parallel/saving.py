"""`GuardedSave`: a model whose weights are cut is not saved as if they were whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

State = Mapping[str, Tensor]


class GuardedSave:
    """Takes the place of a model's own `save_pretrained`, which trainers call on one rank or on all.

    It saves a state that is whole, or one that it can make whole without other ranks. Else it refuses.

    Args:
        model: that has the method.
        whole: makes the whole state of the model if that takes no other rank, else gives `None`.
        is_whole: whether a state that is given can be saved.
        how: what makes the whole state, in code, on all ranks.
    """

    def __init__(
        self,
        model: Any,
        *,
        whole: Callable[[], State | None],
        is_whole: Callable[[State], bool],
        how: str,
    ) -> None:
        self._model, self._whole, self._is_whole, self._how = model, whole, is_whole, how

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Saves as the model's own would.

        Raises:
            RuntimeError: the state takes other ranks, which nobody here knows to be calling.
        """
        model = self._model
        own = type(model).save_pretrained
        given = inspect.signature(own).bind(model, *args, **kwargs)
        named = "state_dict" in given.signature.parameters
        options = given.arguments if named else given.arguments.setdefault("kwargs", {})
        state = options.get("state_dict")
        if state is None or not self._is_whole(state):
            state = self._whole()
        if state is None:
            raise RuntimeError(
                f"weights of {type(model).__name__} are shared out over ranks, and save_pretrained would "
                f"save this rank's: call state = {self._how} on every rank, then on one of them "
                "save_pretrained(..., state_dict=state)"
            )
        options["state_dict"] = state
        return own(*given.args, **given.kwargs)

    def put(self) -> None:
        """Takes the place."""
        self._model.save_pretrained = self

    def take_away(self) -> None:
        """Leaves it to the model's own."""
        if vars(self._model).get("save_pretrained") is self:
            del self._model.save_pretrained


def guard_saving(model: nn.Module) -> None:
    """Guards a model that a policy has cut; where attention was replaced, that sees to it."""
    for module in model.modules():
        if hasattr(module, "save_pretrained") and "save_pretrained" not in vars(module):
            GuardedSave(
                module,
                whole=lambda: None,
                is_whole=is_plain,
                how="seqpar.tensor_parallel.whole_state(model)",
            ).put()


def is_plain(state: State) -> bool:
    """Whether no tensor of a state is a DTensor, of which a rank has a part."""
    return not any(hasattr(x, "full_tensor") for x in state.values())
