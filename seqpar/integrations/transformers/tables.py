"""Tokens and positions that are looked up in tables: a rank alone would fail at those there are not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def check_tokens(model: PreTrainedModel, stack: PreTrainedModel, tokens: Tensor | None) -> None:
    """Refuses tokens without an embedding, but for those that stand for images and need none.

    Raises:
        ValueError: there is one.
    """
    try:
        size = getattr(stack.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # the model does not say which they are
        return
    if size is None or tokens is None:
        return
    if stack is not model:
        names = ("_token_id", "_token_index")
        places = [
            x for n, x in vars(model.config).items() if n.endswith(names) and isinstance(x, int)
        ]
        tokens = tokens[~torch.isin(tokens, tokens.new_tensor(places))]
    if tokens.numel() == 0:
        return
    least, most = tokens.min().item(), tokens.max().item()
    if least < 0 or most >= size:
        raise ValueError(f"input_ids must be 0 ... {size - 1}, got {least} ... {most}")


def check_positions(stack: PreTrainedModel, positions: Tensor | None, length: int) -> None:
    """Refuses positions that a table of the model does not have.

    Args:
        positions: of the whole sequence; by default 0 ... length - 1.

    Raises:
        ValueError: there is one.
    """
    size = getattr(stack.config, "max_position_embeddings", None)
    if size is None or not _has_table(stack, size):
        return
    most = length - 1 if positions is None else int(positions.max())
    if most >= size:
        raise ValueError(
            f"{type(stack).__name__} has a table of {size} positions, got position {most}"
        )


def _has_table(model: PreTrainedModel, size: int) -> bool:
    """Whether positions are looked up in a table, of their number and at most two rows (OPT's) more."""
    try:
        tokens = model.get_input_embeddings()
    except NotImplementedError:
        tokens = None
    for module in model.modules():
        table = getattr(module, "embed_positions", None)  # CodeGen's is a tensor
        if isinstance(table, Tensor) and len(table) == size:
            return True
        if module is tokens or not isinstance(module, nn.Embedding):
            continue
        if 0 <= module.num_embeddings - size <= 2:
            return True
    return False
