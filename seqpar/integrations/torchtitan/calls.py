"""What travels with a call of a model to its inner attention, and what attends there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.protocols.module import Module

from seqpar.comm import Group, agreed
from seqpar.data import unshard_sequence
from seqpar.functional import attention, attention_with_lse
from seqpar.layout import Layout, Mask
from seqpar.module import Attention
from seqpar.strategies import Plan
from seqpar_kernels import Score

Window = tuple[int, int] | None


class Call:
    """A call of a model: the plan, to which each layer adds its window and scale.

    Args:
        plan: of the ranks along "cp".
        documents: by batch entry, the boundaries of its documents.
        windows: of all layers.
    """

    # docs/design.md: what a model is called with is no dataclass of ours
    def __init__(
        self, plan: Plan, documents: list[tuple[int, ...]], windows: Iterable[Window]
    ) -> None:
        self._plan = plan
        # Made here, outside of compiled blocks, masks are no constants there.
        self._masks = {
            window: tuple(Mask(causal=True, window=window, documents=x) for x in documents)
            for window in windows
        }

    def plan(self, window: Window, scale: float | None) -> Plan:
        """The plan of a layer."""
        return replace(self._plan, mask=self._masks[window], score=Score(scale=scale))


class InnerAttention(Module):
    """The inner attention of a block, over the ranks along "cp". Holds no parameters.

    Its arguments have the names that torchtitan's sharding goes by.

    Args:
        group: the ranks along "cp".
        window: how many keys a row sees before it, and behind it; `None` is all up to itself.
    """

    def __init__(self, group: Group, window: Window) -> None:
        super().__init__()
        self.group, self.window = group, window

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Call,
        scale: float | None = None,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """This rank's rows `[b sl hq vd]`, or what `out_transform` makes of them and their lse `[b sl hq]`.

        Raises:
            NotImplementedError: a block asks for more, such as a `score_mod`, or brings masks of its own.
            DesyncError: another rank raised; and what `seqpar.attention` does.
        """
        unknown = sorted(options.keys() - {"enable_gqa"})
        if unknown or not isinstance(attention_masks, Call):
            with agreed(self.group, operation="attention"):
                raise NotImplementedError(
                    f"inner attention takes no {unknown}, and masks only from the model that parallelize was "
                    f"given, got {type(attention_masks).__name__}"
                )
        plan = attention_masks.plan(self.window, scale)
        if out_transform is None:
            return attention(q_BLNH, k_BLNH, v_BLNH, plan)
        return out_transform(*attention_with_lse(q_BLNH, k_BLNH, v_BLNH, plan))


class Calls:
    """A hook before a model: makes a `Call` of the positions that it is given.

    Args:
        attend: over the ranks along "cp".
        layout: by which the trainer shards sequences.
        windows: of the model's layers.
    """

    def __init__(self, attend: Attention, layout: Layout, windows: set[Window]) -> None:
        self.attend, self.layout, self.windows = attend, layout, windows

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with the call in the place of masks."""
        group, positions = self.attend.group, kwargs.get("positions")
        num_rows = self.layout.rows[group.rank]
        with agreed(group, operation="a call of the model"):
            if not isinstance(positions, Tensor):
                raise ValueError(
                    "call the model with positions=, as torchtitan's trainer does: masks are made of them"
                )
            if kwargs.get("attention_masks") is not None:
                raise ValueError(
                    "leave attention_masks out, or None: masks are made of the positions"
                )
            if hasattr(positions, "to_local"):  # a DTensor
                positions = positions.to_local()
            if positions.shape[1] != num_rows:
                raise ValueError(
                    f"rank {group.rank} of {group.size} must be given {num_rows} of the "
                    f"{self.layout.length} positions that training.seq_len says, got "
                    f"{positions.shape[1]}; does the trainer shard them, and only once?"
                )
        documents = documents_of(unshard_sequence(positions, self.layout, group))
        call = Call(self.attend.plan(self.layout), documents, self.windows)
        return args, kwargs | {"attention_masks": call}


def documents_of(positions: Tensor) -> list[tuple[int, ...]]:
    """The boundaries of documents, by batch entry, of whole positions `[b s]`; at 0 a document begins.

    Raises:
        ValueError: positions neither begin at 0 nor go up by 1, as where they are in another order.
    """
    positions = positions.cpu()  # once, and not for each entry
    begins = positions == 0
    goes_on = positions[:, 1:] == positions[:, :-1] + 1
    wrong = ~torch.cat([begins[:, :1], begins[:, 1:] | goes_on], dim=1)
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"positions of documents must begin at 0 and go up by 1, but those of batch entry {row} end in "
            f"{positions[row, max(place - 1, 0) : place + 1].tolist()} at place {place}: are they sharded "
            "as parallelism.context_parallel_load_balancer says, once?"
        )
    length = positions.shape[1]
    return [(*row.nonzero().flatten().tolist(), length) for row in begins]
