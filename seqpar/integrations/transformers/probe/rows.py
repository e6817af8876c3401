"""Whether a model treats every row by itself, but for attention: the one thing that sharding its rows needs.

Two runs in which attention shows each row only itself. Some rows of the first are in the second too, with
the same token and position, but elsewhere and between other rows. A module that is given the same for
them and does not return the same lets something pass between rows that ranks would not see: attention of
its own, a convolution, a state, positions counted rather than taken from position_ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from seqpar.integrations.transformers.attention.terms import Layer, Terms

NUM_ROWS = 11  # prime, so that hardly a tensor has this size in another dimension


@dataclass(frozen=True)
class Event:
    """What a module was given and what it returned, as tensors `[1, rows, ...]`."""

    name: str
    given: list[Tensor]
    returned: list[Tensor]


@dataclass(eq=False)
class Trace:
    """Attention in which a row sees itself alone, and what the modules did meanwhile."""

    num_rows: int
    names: dict[nn.Module, str]
    events: list[Event] = field(default_factory=list)
    layers: list[tuple[Layer, Terms]] = field(default_factory=list)
    output: Any = None
    _pending: dict[nn.Module, list[Tensor]] = field(default_factory=dict)

    def attend(self, layer: Layer) -> Tensor:
        """The value of the row itself, `[b sl hq vd]`."""
        try:
            self.layers.append((layer, Terms.of(layer)))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"{self.title(layer.module)}: {error}") from error
        x = layer.rows_first()
        self._pending.setdefault(layer.module, []).extend(x)
        return x[2].repeat_interleave(x[0].shape[2] // x[2].shape[2], dim=2)

    def title(self, module: nn.Module) -> str:
        """The module's name and class."""
        return f"{self.names.get(module) or 'the model'} ({type(module).__name__})"

    def note(self, module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        """A forward hook."""
        given = list(self._rows((args, kwargs)))
        back = [*self._rows(returned), *self._pending.pop(module, [])]
        self.events.append(Event(self.title(module), given, back))

    def _rows(self, value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            value = value.to_local() if hasattr(value, "to_local") else value  # of a DTensor
            if value.ndim > 1 and value.shape[:2] == (1, self.num_rows):
                yield value.detach()
        elif isinstance(value, dict):
            yield from self._rows(tuple(value.values()))
        elif isinstance(value, (tuple, list)):
            for each in value:
                yield from self._rows(each)


def run_traced(model: nn.Module, inputs: dict[str, Any], num_rows: int) -> Trace:
    """What every module does in a run whose attention shows each row itself alone."""
    trace = Trace(num_rows, {module: name for name, module in model.named_modules()})
    hooks = [
        module.register_forward_hook(trace.note, with_kwargs=True)
        for module in trace.names
        if not type(module).__module__.startswith("torch.nn.modules")
    ]
    try:
        trace.output = model(**inputs, seqpar=trace)
    finally:
        for hook in hooks:
            hook.remove()
    return trace


@dataclass(frozen=True)
class TwoRuns:
    """What two runs are given, `[1, rows]`; the first is at positions 0, 1, ...

    Row `kept[i]` of the first is row `places[i]` of the second; both neighbours of each are new there, and
    some of what is new are special tokens.
    """

    tokens: Int[Tensor, "1 r"]
    others: Int[Tensor, "1 r"]
    positions: Int[Tensor, "1 r"]  # of the others
    kept: list[int]
    places: list[int]


def two_runs(num_rows: int, vocabulary: int, special: list[int]) -> TwoRuns:
    """Two runs of as many rows, every second of which is in both."""
    places = list(range(1, num_rows, 2))
    kept = [2 * i for i in reversed(range(len(places)))]
    tokens, others = ((5 + torch.arange(2 * num_rows)) % vocabulary).chunk(2)
    others = others.clone()
    new = others[0::2]
    new[: len(special)] = torch.tensor(special[: len(new)], dtype=others.dtype)
    others[places] = tokens[kept]
    positions = torch.empty_like(others)
    positions[places] = torch.tensor(kept)
    positions[0::2] = torch.tensor([i for i in range(num_rows) if i not in kept])
    return TwoRuns(tokens[None], others[None], positions[None], kept, places)


def culprit(one: Trace, two: Trace, runs: TwoRuns) -> str | None:
    """The innermost module that returns something else for rows that it was given alike, if any."""
    events = [[e for e in trace.events if e.returned] for trace in (one, two)]
    if [e.name for e in events[0]] != [e.name for e in events[1]]:
        return "the model, which runs other modules for other tokens,"
    for a, b in zip(*events, strict=True):
        if _alike(a.given, b.given, runs) and not _alike(a.returned, b.returned, runs):
            return a.name
    return None


def _alike(one: list[Tensor], two: list[Tensor], runs: TwoRuns) -> bool:
    if [x.shape for x in one] != [x.shape for x in two]:
        return False
    return all(same_rows(x[0, runs.kept], y[0, runs.places]) for x, y in zip(one, two, strict=True))


def same_rows(x: Float[Tensor, "r *d"], y: Float[Tensor, "r *d"]) -> bool:
    """Whether at least half of the rows are the same but for rounding.

    Half, since a token that is routed to another expert by a rounding error is another token. Models of
    float64 have steps in float32, such as the softmax of eager attention.
    """
    if not x.is_floating_point():
        return torch.equal(x, y)
    step = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = step**0.5 * x.abs().max()
    off = ~((x - y).abs() <= tolerance)  # NaN is not the same
    return int(off.reshape(len(x), -1).any(1).sum()) * 2 <= len(x)
