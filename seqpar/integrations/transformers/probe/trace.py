"""`Trace`: the attention of a trial, and which modules let something pass between rows meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.integrations.transformers.attention.call import Call
from seqpar.integrations.transformers.attention.patterns import Pattern
from seqpar.integrations.transformers.attention.temperature import untempered
from seqpar.integrations.transformers.attention.terms import Layer, Terms
from seqpar.integrations.transformers.probe.compare import same_rows
from seqpar.integrations.transformers.probe.tokens import ALONE, MOVED, SEQUENCES, Tokens


class Trace:
    """Attention in which the rows of the first sequences see themselves alone. Others attend by a call.

    Args:
        model: whose modules are watched.
        tokens: that it is given.
        call: by which the other sequences attend.
        num_alone: how many sequences are first.

    Attributes:
        attending: the modules that attended, in order.
        terms: what each of them asked for.
        culprits: modules that returned something else for rows that they were given alike, innermost first.
    """

    # docs/design.md: what a model is called with is no dataclass of ours
    def __init__(self, model: nn.Module, tokens: Tokens, call: Call, num_alone: int = 0) -> None:
        self.tokens, self.call, self.num_alone = tokens, call, num_alone
        self.attending: list[nn.Module] = []
        self.terms: list[Terms] = []
        self.handed: Pattern | None = (
            None  # see `Call`, which then looks at what it has in each call
        )
        self.culprits: list[str] = []
        self._attended: dict[nn.Module, list[Tensor]] = {}
        self._names = {module: name for name, module in model.named_modules()}
        self._shapes = {(n, tokens.num_rows) for n in (1, len(SEQUENCES))}

    def attend(self, layer: Layer) -> Tensor:
        """The rows `[b sl hq vd]` of a layer's attention; of a row that sees itself alone, its value."""
        try:
            terms = Terms.of(layer, says_its_form=self.handed is None)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"{self._title(layer.module)}: {error}") from error
        self.terms.append(terms)
        self.attending.append(layer.module)
        q, k, v = layer.rows_first()
        # Not as the layer has scaled them by its own count of rows, which the call makes good.
        self._attended.setdefault(layer.module, []).extend((untempered(layer.module, q), k, v))
        n = self.num_alone
        alone = v[:n].repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        others = replace(layer, q=layer.q[n:], k=layer.k[n:], v=layer.v[n:])
        return torch.cat([alone, self.call.attend(others, terms)])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block of code in which the calls of all modules are watched, but for those of torch itself."""
        hooks = [
            module.register_forward_hook(self._watch, with_kwargs=True)
            for module in self._names
            if not type(module).__module__.startswith("torch.nn.modules")
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _watch(self, module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        """Looks at a call that has run, as a forward hook. What attention is given counts as returned."""
        back = (returned, self._attended.pop(module, []))
        if self._alike((args, kwargs)) and not self._alike(back):
            self.culprits.append(self._title(module))

    def _alike(self, value: Any) -> bool:
        """Whether rows that are in two sequences are the same in both, wherever a value has rows."""
        kept, places = self.tokens.kept, self.tokens.places
        return all(same_rows(x[ALONE, kept], x[MOVED, places]) for x in self._rows(value))

    def _rows(self, value: Any) -> Iterator[Tensor]:
        """The tensors `[sequences, rows, ...]` in a value, or `[1, rows, ...]` for all sequences."""
        if isinstance(value, Tensor):
            value = value.to_local() if hasattr(value, "to_local") else value  # of a DTensor
            if value.ndim > 1 and value.shape[:2] in self._shapes:
                yield value.detach().expand(len(SEQUENCES), *value.shape[1:])
        elif isinstance(value, dict):
            yield from self._rows(tuple(value.values()))
        elif isinstance(value, (tuple, list)):
            for each in value:
                yield from self._rows(each)

    def _title(self, module: nn.Module) -> str:
        """The module's name and class."""
        return f"{self._names.get(module) or 'the model'} ({type(module).__name__})"
