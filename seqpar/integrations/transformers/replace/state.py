"""The state of a model with stand-ins in it, under its own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar.integrations.transformers.attention.replacement import Replacement
from seqpar.tensor_parallel.saving import Saving, is_plain

Placed = Iterable[tuple[str, Any]]  # stand-ins and their places in a model


def whole_of(placed: Placed) -> dict[str, Tensor]:
    """The whole weights of attention, by their names in the model. All ranks must call."""
    return {
        f"{path}.{name}": x
        for path, replacement in placed
        for name, x in replacement.layer.whole_state().items()
    }


def shapes_of(placed: Placed) -> dict[str, tuple[int, ...]]:
    """The shapes of these."""
    return {
        f"{path}.{name}": shape
        for path, replacement in placed
        for name, shape in replacement.layer.weights.shapes(replacement.layer).items()
    }


def _placed_in(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, Replacement)]


def _kept(state: Mapping[str, Tensor], placed: Placed) -> dict[str, Tensor]:
    """What of a model's state stands in for nothing."""
    ours = tuple(f"{path}.layer." for path, _ in placed)
    return {name: x for name, x in state.items() if not name.startswith(ours)}


def _whole_alone(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The state under the model's own names, if that takes no other rank."""
    placed, state = _placed_in(model), model.state_dict()
    if any(m.handover.group.size > 1 for _, m in placed) or not is_plain(state):
        return None
    return _kept(state, placed) | whole_of(placed)


def _fit(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """The state under the model's own names, if it is whole; it may be that of a model around it."""
    placed = _placed_in(model)
    own = {*shapes_of(placed), *_kept(model.state_dict(), placed)}
    first = next(iter(state), "")
    places = {first.removesuffix(name) for name in own if first.endswith(name)}
    for place in sorted(places, key=len):
        fits = is_plain(state) and all(
            n.startswith(place) and n.removeprefix(place) in own for n in state
        )
        if fits:
            return {n.removeprefix(place): x for n, x in state.items()}
    return None


REPLACED = Saving(_whole_alone, _fit, how="replaced.state_dict()")
