"""`SequenceParallelTrainer`: the Trainer of transformers, on sequences that ranks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.comm import agreed
from seqpar.data import IGNORE, unshard_sequence
from seqpar.integrations.replicas import OnReplicas
from seqpar.integrations.transformers import Inputs
from seqpar.integrations.transformers.setup import cross_entropy
from seqpar.loss import count_tokens

from transformers import Trainer  # isort: skip - that it is there was seen above

# Methods that a class beside this one may not have, since its own would never be called.
OWN = ("compute_loss", "prediction_step", "get_batch_samples")


class SequenceParallelTrainer(OnReplicas):
    """A Trainer of transformers that spreads each sequence over ranks. All processes make one.

    Losses, gradient norms, clipping, schedules, metrics and checkpoints are those of one process for each
    replica; the evaluation loss is the mean over batches, each the mean over its tokens. It takes `attend`
    and what Trainer takes. With another subclass of Trainer that computes no loss of its own:
    `class Mine(SequenceParallelTrainer, Theirs)`.

    Args:
        attend: how ranks share a sequence, such as `seqpar.RingAttention(group)`. Or what makes that of a
            group, such as `seqpar.RingAttention` itself; the group is then the dimension "cp" of
            `TrainingArguments(parallelism_config=...)`, and all processes where there is none.

    Raises:
        NotImplementedError: the model cannot be sharded (see `SequenceParallel`), or options or another class
            would compute other losses than one process has.
        ValueError: as `share_sequences`.
        DesyncError: another process raised one of the above, or processes differ in options.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Losses are divided by the tokens of all micro-batches here, and Trainer divides no further.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of a step, and how many of their tokens count, over all replicas."""
        batches = self.fetched(epoch_iterator, num_batches)
        if not batches:
            return batches, None
        everyone, shifts = self.replicas.everyone, self.sp.findings.labels == "next"
        with agreed(everyone, operation="get_batch_samples"):
            missing = [sorted(batch) for batch in batches if batch.get("labels") is None]
            if missing:
                raise ValueError(f"a batch to train on needs labels, got {missing[0]}")
        labels = [batch["labels"].to(device) for batch in batches]
        valid = [(x[..., 1:] if shifts else x) != IGNORE for x in labels]
        return batches, count_tokens(valid, everyone) // self.replicas.size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a whole batch that all ranks of a replica are given; outputs are of whole sequences.

        In training the mean is over all replicas, in evaluation over this one. A loss that is computed from
        those outputs on every rank, and added, has its right gradient: gradients are summed over the ranks of
        a replica, and averaged over all.

        Args:
            num_items_in_batch: what sums over tokens are divided by, as `get_batch_samples` counts it.
        """
        everyone = self.replicas.everyone if model.training else self.attend.group
        smoothing, token_losses = self.args.label_smoothing_factor, None
        if smoothing:
            token_losses = partial(cross_entropy, label_smoothing=smoothing)
        with self.drawn_apart(model) as seed:
            shard = self.sp.shard(inputs, seed=seed)
            outputs = model(**shard, return_dict=True)
            loss = self.sp.loss_of(
                outputs.logits,
                shard,
                everyone=everyone,
                gradients="mean",
                num_tokens=num_items_in_batch,
                token_losses=token_losses,
            )
        return (loss, self._whole(outputs, shard)) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss of a replica's batch, its outputs for whole sequences, in order, and its labels."""
        inputs = self._prepare_inputs(inputs)
        labels, loss = inputs.get("labels"), None
        if ignore_keys is None:
            ignore_keys = getattr(self.sp.inner.config, "keys_to_ignore_at_inference", ["cache"])
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is None:
                shard = self.sp.shard(inputs)
                outputs = self._whole(model(**shard, return_dict=True), shard)
            elif prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                loss = loss.detach()
        found = tuple(x for name, x in outputs.items() if name not in ignore_keys)
        return loss, found[0] if len(found) == 1 else found, labels

    def _whole(self, outputs: Any, shard: Inputs) -> Any:
        """What ranks hold of a tensor, of several or of all outputs, in the order of the sequence."""
        if isinstance(outputs, Tensor):
            return unshard_sequence(outputs, shard.layout, self.attend.group)
        if isinstance(outputs, Mapping):
            return type(outputs)(**{n: self._whole(x, shard) for n, x in outputs.items()})
        return tuple(self._whole(x, shard) for x in outputs)

    def _unsupported(self) -> dict[str, bool]:
        order = type(self).__mro__
        beside = order[order.index(SequenceParallelTrainer) + 1 :]
        owners = {name: next(c for c in beside if name in vars(c)) for name in OWN}
        return super()._unsupported() | {
            f"{owner.__name__} beside SequenceParallelTrainer, whose own {name} would not be called": (
                owner is not Trainer
            )
            for name, owner in owners.items()
        }
