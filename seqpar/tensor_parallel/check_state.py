"""Whether a state dict has the names and shapes that it must have; the words for when it has not."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a state of other names or shapes, before anything is written.

    Raises:
        ValueError: a name is missing or unexpected, or a shape is another.
    """
    missing, unexpected = sorted(set(shapes) - set(state)), sorted(set(state) - set(shapes))
    if missing or unexpected:
        raise ValueError(
            f"the state must have the whole weights by their names in the model; missing {missing}, "
            f"unexpected {unexpected}"
        )
    for name, shape in shapes.items():
        if tuple(state[name].shape) != tuple(shape):
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(state[name].shape)}")
