"""`Tokens`: the few tokens that a model is tried on, and what each run of the trial gives it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from seqpar.integrations.transformers.probe.config import text_stack

NUM_ROWS = 11  # prime, so that hardly a tensor has this size in another dimension
PACKED_AT = 3  # where a second document starts, and up to where tokens are hidden

# The sequences that are given with positions and a mask. In the first two a row sees itself alone.
ALONE, MOVED, WHOLE, PACKED, APART = SEQUENCES = range(5)


class Runs(NamedTuple):
    """What each run gives a model, as keyword arguments.

    Args:
        plain: the tokens alone: one sequence.
        numbered: with position_ids: a sequence in order, and one of two documents.
        masked: with an attention_mask that hides the rows before `PACKED_AT`: one sequence.
        both: with position_ids and an attention_mask that hides nothing, as `SequenceParallel.shard` gives
            them: the five sequences. Without a mask, models take a jump of position_ids for a new document.
    """

    plain: dict[str, Any]
    numbered: dict[str, Any]
    masked: dict[str, Any]
    both: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The few tokens that a model is run on, on its device.

    Every second row of `tokens` is in `others` too. Row `kept[i]` of the first is row `places[i]` of the
    second, at the same position. Both its neighbours are new there, and some of what is new are special
    tokens.

    Args:
        positions: of the others; those of the tokens are 0, 1, ...
    """

    num_rows: int
    tokens: Int[Tensor, "r"]
    others: Int[Tensor, "r"]
    positions: Int[Tensor, "r"]
    kept: list[int]
    places: list[int]

    @staticmethod
    def of(inner: PreTrainedModel) -> Tokens:
        """Draws those of a model."""
        config = inner.config.get_text_config()
        num_rows = min(NUM_ROWS, getattr(config, "max_position_embeddings", None) or NUM_ROWS)
        places = list(range(1, num_rows, 2))
        kept = [2 * i for i in reversed(range(len(places)))]
        drawn = (5 + torch.arange(2 * num_rows)) % config.vocab_size
        tokens, others = (x.clone() for x in drawn.chunk(2))
        new, special = others[0::2], _special_tokens(inner)
        new[: len(special)] = torch.tensor(special[: len(new)], dtype=others.dtype)
        others[places] = tokens[kept]
        positions = torch.empty_like(others)
        positions[places] = torch.tensor(kept)
        positions[0::2] = torch.tensor([i for i in range(num_rows) if i not in kept])
        tokens, others, positions = (x.to(inner.device) for x in (tokens, others, positions))
        return Tokens(num_rows, tokens, others, positions, kept, places)

    def runs(self, inner: PreTrainedModel, *, first: int) -> Runs:
        """The arguments of all runs, with positions that are counted from `first`."""
        order = torch.arange(self.num_rows, device=self.tokens.device)
        seen = order >= PACKED_AT
        anew = order - PACKED_AT * seen
        one, two = self.tokens[None], self.tokens.repeat(2, 1)
        five = torch.stack([self.others if i == MOVED else self.tokens for i in SEQUENCES])
        positions = torch.stack([order, self.positions, order, anew, order]) + first
        given = (
            {"input_ids": one},
            {"input_ids": two, "position_ids": positions[[WHOLE, PACKED]]},
            {"input_ids": one, "attention_mask": seen.long()[None]},
            {"input_ids": five, "position_ids": positions, "attention_mask": torch.ones_like(five)},
        )
        return Runs(*(common_arguments(inner, return_dict=True, **tensors) for tensors in given))


def common_arguments(inner: PreTrainedModel, **arguments: Any) -> dict[str, Any]:
    """Arguments for every call: no cache is kept, where the model or its text layers could."""
    signatures = (inspect.signature(m.forward).parameters for m in (inner, text_stack(inner)))
    takes_cache = any("use_cache" in parameters for parameters in signatures)
    return arguments | ({"use_cache": False} if takes_cache else {})


def padding_token(inner: PreTrainedModel) -> int | None:
    """The token that a model takes for padding, if it has one."""
    padding = getattr(inner.config.get_text_config(), "pad_token_id", None)
    return padding if isinstance(padding, int) else None


def _special_tokens(inner: PreTrainedModel) -> list[int]:
    """Tokens that may change what a model does with others, such as the mask token of ESM."""
    config = inner.config.get_text_config()
    pairs = sorted(config.to_dict().items())
    ids = {x for n, x in pairs if n.endswith("_token_id") and isinstance(x, int)}
    padding = padding_token(inner)
    return sorted(i for i in ids if i != padding and 0 <= i < config.vocab_size)
