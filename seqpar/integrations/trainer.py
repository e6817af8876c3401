"""`SequenceParallelTrainer`: the Trainer of transformers, on sequences that ranks share.

Trainer gives every process batches of its own, takes the mean over processes, and draws dropout alike on all.
Where processes share sequences each of these is another: a batch is a replica's, tokens count once, and ranks
hold other rows. What is changed of Trainer is here, method by method; its loop is its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqpar.comm import agreed
from seqpar.data import IGNORE, unshard_sequence
from seqpar.integrations.accelerate import Attend, share_sequences
from seqpar.integrations.transformers import Inputs, SequenceParallel
from seqpar.integrations.transformers.probe.config import inner_model
from seqpar.loss import count_tokens

from transformers import Trainer  # isort: skip - that it is there was seen above

# Methods that a class beside this one may not have, since its own would never be called.
OWN = ("compute_loss", "prediction_step")
# What processes must have alike.
COMPARED = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps",
    "num_train_epochs", "seed", "data_seed", "label_smoothing_factor",
)  # fmt: skip


class SequenceParallelTrainer(Trainer):
    """A Trainer of transformers that spreads each sequence over ranks. All processes make one.

    Losses, gradient norms, clipping, schedules, metrics and checkpoints are those of one process for each
    replica. It takes what Trainer takes, and `attend`. With another subclass of Trainer that computes no loss
    of its own: `class Mine(SequenceParallelTrainer, Theirs)`.

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

    def __init__(self, *args: Any, attend: Attend, **kwargs: Any) -> None:
        self._attend = attend
        self._sp: SequenceParallel | None = None
        self._calls = (-1, 0)  # the step and the number of the last micro-batch in it
        super().__init__(*args, **kwargs)
        # Losses are divided by the tokens of all micro-batches here, and Trainer divides no further.
        self.model_accepts_loss_kwargs = True
        with agreed(self.replicas.everyone, operation="SequenceParallelTrainer") as claim:
            claim |= {name: getattr(self.args, name) for name in COMPARED}
            self._check_options()
        if not self.is_fsdp_enabled:  # which may load weights later
            _ = self.sp

    @property
    def sp(self) -> SequenceParallel:
        """The model on shared sequences. All processes call it first together."""
        assert self.model is not None, "Trainer has refused that"
        inner = inner_model(self.model)
        if self._sp is None or self._sp.inner is not inner:  # `model_init` makes another
            self._sp = SequenceParallel(self.model, self.attend)
        return self._sp

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator, and has it deal out batches to replicas."""
        super().create_accelerator_and_postprocess()
        self.attend, self.replicas = share_sequences(self.accelerator, self._attend)

    def get_total_train_batch_size(self, args: Any) -> int:
        """How many sequences a step takes: those of all replicas."""
        batch: int = self._train_batch_size * args.gradient_accumulation_steps
        return batch * len(self.replicas.members)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """This rank's part of the operations of its batch, since Trainer adds those of all processes."""
        return super().floating_point_ops(inputs) // self.replicas.size

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of a step, and how many of their tokens count, over all replicas."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        everyone, shifts = self.replicas.everyone, self.sp.findings.labels == "next"
        with agreed(everyone, operation="get_batch_samples") as claim:
            claim["micro-batches"] = len(batches)
            missing = [sorted(batch) for batch in batches if batch.get("labels") is None]
            if missing:
                raise ValueError(f"a batch to train on needs labels, got {missing[0]}")
        if not batches:
            return batches, None
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

        A loss that is computed from those outputs on every rank, and added, has its right gradient: they are
        summed over the ranks of a replica, and averaged over all.

        Args:
            num_items_in_batch: what sums over tokens are divided by, as `get_batch_samples` counts it.
        """
        group = self.replicas.everyone
        with self._drawn_apart(model) as seed:
            shard = self.sp.shard(inputs, seed=seed)
            outputs = model(**shard, return_dict=True)
            loss = self.sp.loss_of(
                outputs.logits,
                shard,
                everyone=group,
                gradients="mean",
                num_tokens=num_items_in_batch,
                token_losses=self._token_losses,
            )
        if not return_outputs:
            return loss
        return loss, type(outputs)(**{name: self._whole(x, shard) for name, x in outputs.items()})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss of a replica's batch, its outputs for whole sequences, in order, and its labels."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        if ignore_keys is None:
            ignore_keys = getattr(self.sp.inner.config, "keys_to_ignore_at_inference", ["cache"])
        with torch.no_grad(), self.compute_loss_context_manager():
            shard = self.sp.shard(inputs)
            outputs = model(**shard, return_dict=True)
            loss = None
            if labels is not None:
                loss = self.sp.loss_of(outputs.logits, shard, token_losses=self._token_losses)
            if prediction_loss_only:
                return loss, None, None
            found = tuple(self._whole(x, shard) for n, x in outputs.items() if n not in ignore_keys)
        return loss, found[0] if len(found) == 1 else found, labels

    def _prepare_context_parallel_inputs(
        self,
        model: nn.Module,  # noqa: ARG002
        inputs: dict[str, Any],
    ) -> tuple[Callable[[], AbstractContextManager[None]], dict[str, Any]]:
        """Leaves batches whole, which Trainer would cut for torch's own context parallelism."""
        return nullcontext, inputs

    @property
    def _token_losses(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        smoothing = self.args.label_smoothing_factor
        return partial(_smoothed, smoothing=smoothing) if smoothing else None

    def _whole(self, x: Any, shard: Inputs) -> Any:
        """What ranks hold of a tensor, or of several, put together in the order of the sequence."""
        if isinstance(x, Tensor):
            return unshard_sequence(x, shard.layout, self.attend.group)
        return tuple(self._whole(each, shard) for each in x)

    @contextmanager
    def _drawn_apart(self, model: nn.Module) -> Iterator[int | None]:
        """Gives a seed for attention, and lets torch draw apart on ranks, which hold other rows.

        Outside of it ranks of a replica draw alike, as they must: collators may draw what tokens to mask.
        """
        if not model.training:
            yield None
            return
        step, count = self._calls
        now = self.state.global_step
        self._calls = step, count = (now, count + 1 if now == step else 0)
        place = (self.args.seed, step, count, self.replicas.index)
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(*place, self.attend.group.rank))
            yield _seed(*place)

    def _check_options(self) -> None:
        """Refuses what would compute other losses than one process has, or leave ranks waiting."""
        args, shared = self.args, self.replicas.size > 1
        beside = type(self).__mro__[type(self).__mro__.index(SequenceParallelTrainer) + 1 :]
        for name in OWN:
            owner = next(c for c in beside if name in vars(c))
            if owner is not Trainer:
                raise NotImplementedError(
                    f"{owner.__name__} has a {name} of its own, which would not be called; have it call "
                    "seqpar.integrations.transformers.SequenceParallel, as SequenceParallelTrainer does"
                )
        refused = {
            "compute_loss_func, which takes logits of whole sequences": self.compute_loss_func
            is not None,
            "DeepSpeed": self.is_deepspeed_enabled,
            "torch.nn.DataParallel (start one process for each GPU with torchrun)": args.n_gpu > 1,
            "neftune_noise_alpha, whose noise is scaled by the length of a shard": shared
            and self.neftune_noise_alpha is not None,
            "train_sampling_strategy='batch_rebalance', which deals out to processes": shared
            and getattr(args, "train_sampling_strategy", "") == "batch_rebalance",
            "auto_find_batch_size, which one rank would do alone": shared
            and args.auto_find_batch_size,
            "eval_use_gather_object": shared and args.eval_use_gather_object,
            "average_tokens_across_devices=False, a mean of means": len(self.replicas.members) > 1
            and not args.average_tokens_across_devices,
        }
        found = [what for what, is_there in refused.items() if is_there]
        if found:
            raise NotImplementedError(f"not supported on shared sequences: {'; '.join(found)}")


def _smoothed(logits: Tensor, labels: Tensor, *, smoothing: float) -> Tensor:
    """Cross entropy with the labels smoothed, as `transformers.trainer_pt_utils.LabelSmoother` has it."""
    return F.cross_entropy(
        logits.float() if logits.element_size() < 4 else logits,
        labels,
        reduction="none",
        ignore_index=IGNORE,
        label_smoothing=smoothing,
    )


def _seed(*parts: int) -> int:
    """A seed for each place in a run, far from those of its neighbours."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")
