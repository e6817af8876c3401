"""`GuardedSave`: a model whose weights are cut is not saved as if they were whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor, nn

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Saving:
    """What is known of the state of a kind of model.

    Args:
        whole: makes the whole state of a model if that takes no other rank, else gives `None`.
        fit: gives what is to be saved of a state, or `None` if it is not whole.
        how: what makes the whole state, in code, on all ranks.
    """

    whole: Callable[[Any], State | None]
    fit: Callable[[Any, State], State | None]
    how: str


class GuardedSave:
    """Takes the place of a model's own `save_pretrained`, which trainers call on one rank or on all.

    It saves a state that is whole, or one that it can make whole without other ranks. Else it refuses.
    """

    def __init__(self, model: Any, saving: Saving) -> None:
        self._model = ref(model)  # which holds this, and must go when its user lets go of it
        self._saving = saving

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Saves as the model's own would.

        Raises:
            RuntimeError: the state takes other ranks, which nobody here knows to be calling.
        """
        model, saving = self._model(), self._saving
        own = type(model).save_pretrained  # type: ignore[union-attr]
        given = inspect.signature(own).bind(model, *args, **kwargs)
        named = "state_dict" in given.signature.parameters  # PEFT takes it among others
        options = given.arguments if named else given.arguments.setdefault("kwargs", {})
        state = options.get("state_dict")
        state = None if state is None else saving.fit(model, state)
        state = saving.whole(model) if state is None else state
        if state is None:
            raise RuntimeError(
                f"weights of {type(model).__name__} are shared out over ranks, and save_pretrained would "
                f"save this rank's: call state = {saving.how} on every rank, then on one of them "
                "save_pretrained(..., state_dict=state)"
            )
        options["state_dict"] = state
        return own(*given.args, **given.kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedSave:
        """That of the model's copy, which is being made."""
        model = self._model()
        return GuardedSave(memo.get(id(model), model), self._saving)

    def __reduce__(self) -> Any:
        """A model is pickled with the weights of a rank, so what is loaded saves nothing as whole."""
        return _refuse, ()


def guard(model: Any, saving: Saving) -> None:
    """Puts a guard in the place of a model's `save_pretrained`."""
    model.save_pretrained = GuardedSave(model, saving)


def unguard(model: Any) -> None:
    """Leaves it to the model's own."""
    vars(model).pop("save_pretrained", None)


def guard_saving(model: nn.Module) -> None:
    """Guards a model that a policy has cut; where attention was replaced, that sees to it."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and "save_pretrained" not in vars(module):
            guard(module, CUT)


def is_plain(state: State) -> bool:
    """Whether no tensor of a state is a DTensor, of which a rank has a part."""
    return not any(hasattr(x, "full_tensor") for x in state.values())


def _nothing(_: Any) -> State | None:
    return None


def _plain(_: Any, state: State) -> State | None:
    return state if is_plain(state) else None


def _refuse() -> Callable[..., Any]:
    return _refused


def _refused(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "this model was pickled while its weights were shared out over ranks: load a whole state"
    )


CUT = Saving(_nothing, _plain, how="seqpar.tensor_parallel.whole_state(model)")
