"""`OnReplicas`: what changes of transformers' Trainer where processes share sequences, whatever the loss.

Trainer takes every process for a replica of its own. Here several make one: they are given the same batches,
whose tokens and operations count once, and they draw dropout for other rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from seqpar.comm import agreed
from seqpar.integrations.accelerate import Attend, share_sequences
from seqpar.integrations.transformers import SequenceParallel
from seqpar.integrations.transformers.probe.config import inner_model

from transformers import Trainer  # isort: skip - that it is there was seen above

# What processes must have alike.
COMPARED = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps",
    "num_train_epochs", "seed", "data_seed", "label_smoothing_factor", "learning_rate", "weight_decay",
    "lr_scheduler_type", "max_grad_norm", "logging_steps", "logging_strategy", "eval_steps", "eval_strategy",
    "save_steps", "save_strategy", "fp16", "bf16", "gradient_checkpointing",
)  # fmt: skip


class OnReplicas(Trainer):
    """A Trainer whose batches are dealt out to replicas, each of which is processes that share sequences.

    Args:
        attend: how they share a sequence, see `SequenceParallelTrainer`.
    """

    def __init__(self, *args: Any, attend: Attend, **kwargs: Any) -> None:
        self._attend = attend
        self._sp: SequenceParallel | None = None
        # The step, and which micro-batch of it came last.
        self._calls = (-1, 0)
        super().__init__(*args, **kwargs)
        with agreed(self.replicas.everyone, operation=type(self).__name__) as claim:
            claim |= {name: str(getattr(self.args, name)) for name in COMPARED}
            refused = [what for what, is_there in self._unsupported().items() if is_there]
            if refused:
                raise NotImplementedError(
                    f"not supported on shared sequences: {'; '.join(refused)}"
                )
        if not self.is_fsdp_enabled:  # which may load weights later
            _ = self.sp

    @property
    def sp(self) -> SequenceParallel:
        """The model on shared sequences. All processes ask for it first together."""
        assert self.model is not None, "Trainer has refused that"
        inner = inner_model(self.model)
        if self._sp is None or self._sp.inner is not inner:  # `model_init` makes another
            self._sp = SequenceParallel(self.model, self.attend)
        return self._sp

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator, and has it deal out batches to replicas."""
        super().create_accelerator_and_postprocess()
        self.attend, self.replicas = share_sequences(self.accelerator, self._attend)
        self.gather_function = self.accelerator.gather_for_metrics  # as it is now

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Prepares for training, also where an evaluation came before."""
        if not self.is_fsdp_enabled:
            _ = self.sp  # before autocast is put round the model, in which outputs differ
        if self.model_wrapped is self.model and self.model is not None:
            # An evaluation has accelerate take the bare model for prepared, which DDP would then never wrap.
            vars(self.model).pop("_is_accelerate_prepared", None)
        return super()._prepare_for_training(*args, **kwargs)

    def fetched(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[Any]:
        """The micro-batches of a step: as many in every process, or an error in all.

        Raises:
            RuntimeError: nothing averages gradients over the processes.
            DesyncError: processes have other numbers of batches, or another one raised.
        """
        everyone = self.replicas.everyone
        with agreed(everyone, operation="the batches of a step") as claim:
            if everyone.size > 1 and self.model_wrapped is self.model and not self.is_fsdp_enabled:
                raise RuntimeError(
                    f"{type(self.model).__name__} is wrapped neither in DDP nor in FSDP, so gradients of the "
                    "ranks would not be added"
                )
            batches = list(islice(epoch_iterator, num_batches))
            claim["micro-batches"] = len(batches)
            # Replicas may have other numbers of batches, and then other learning rates.
            claim["steps of the run"] = self.state.max_steps
        return batches

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluates on a data set whose length is known: else some sequences would count twice.

        Raises:
            NotImplementedError: the data set is a stream.
        """
        if self.replicas.size > 1 and isinstance(dataloader.dataset, IterableDataset):
            raise NotImplementedError(
                "evaluation on shared sequences needs a data set with a length; make a list of the stream"
            )
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Has the ranks of a replica go on from one state, as they draw alike."""
        leader = self.replicas.members[self.replicas.index][0]
        if checkpoint is None or self.replicas.size == 1:
            return super()._load_rng_state(checkpoint)
        saved = Path(checkpoint).resolve() / f"rng_state_{leader}.pth"
        if not saved.exists():
            return None
        with TemporaryDirectory() as folder:
            Path(folder, f"rng_state_{self.args.process_index}.pth").symlink_to(saved)
            return super()._load_rng_state(folder)

    def get_total_train_batch_size(self, args: Any) -> int:
        """How many sequences a step takes: those of all replicas."""
        batch: int = self._train_batch_size * args.gradient_accumulation_steps
        return batch * len(self.replicas.members)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """This rank's part of the operations of its batch, since Trainer adds those of all processes."""
        return super().floating_point_ops(inputs) // self.replicas.size

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counts the tokens of a batch once, where Trainer does for each process that is given it."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        more = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + more // self.replicas.size

    def _prepare_context_parallel_inputs(
        self,
        model: nn.Module,  # noqa: ARG002
        inputs: dict[str, Any],
    ) -> tuple[Callable[[], AbstractContextManager[None]], dict[str, Any]]:
        """Leaves batches whole, which Trainer would cut for torch's own context parallelism."""
        return nullcontext, inputs

    @contextmanager
    def drawn_apart(self, model: nn.Module) -> Iterator[int | None]:
        """Gives a seed for attention, and lets torch draw apart on ranks, which hold other rows.

        Outside of it ranks of a replica draw alike, as they must: collators may draw what tokens to mask.
        """
        if not model.training:
            yield None
            return
        (step, count), now = self._calls, self.state.global_step
        self._calls = now, count + 1 if now == step else 0
        place = (self.args.seed, *self._calls, self.replicas.index)
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(*place, self.attend.group.rank))
            yield _seed(*place)

    def _unsupported(self) -> dict[str, bool]:
        """What would give other losses, or leave ranks waiting, and whether it is asked for."""
        args, shared = self.args, self.replicas.size > 1
        return {
            "DeepSpeed": self.is_deepspeed_enabled,
            "torch.nn.DataParallel (start one process for each GPU with torchrun)": args.n_gpu > 1,
            # TRL gives text here to old releases of transformers.
            "compute_loss_func, which takes logits of whole sequences": callable(
                self.compute_loss_func
            ),
            "label_names other than 'labels'": args.label_names not in (None, ["labels"]),
            "torch_compile (compile layers: `for layer in model.model.layers: layer.compile()`)": shared
            and args.torch_compile,
            "neftune_noise_alpha, whose noise is scaled by the length of a shard": shared
            and self.neftune_noise_alpha is not None,
            "train_sampling_strategy='batch_rebalance', which deals out to processes": shared
            and args.train_sampling_strategy == "batch_rebalance",
            "auto_find_batch_size, which one rank would do alone": shared
            and args.auto_find_batch_size,
            "eval_use_gather_object": shared and args.eval_use_gather_object,
            "average_tokens_across_devices=False, a mean of means": len(self.replicas.members) > 1
            and not args.average_tokens_across_devices,
        }


def _seed(*parts: int) -> int:
    """A seed for each place in a run, far from those of its neighbours."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")
