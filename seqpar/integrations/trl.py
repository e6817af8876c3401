"""TRL's trainers on sequences that ranks share: `SFTTrainer`, `DPOTrainer` and `GRPOTrainer`.

TRL asks its models for the log-probabilities of tokens, and computes every loss from these. Here a model
takes the whole batch that a trainer gives it, runs on this rank's rows, and gives what belongs to tokens for
whole sequences, on every rank. So each rank computes the loss that one device has, and gradients of what it
is computed from are summed over the ranks that share the sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.data import unshard_sequence
from seqpar.integrations.replicas import OnReplicas
from seqpar.integrations.transformers import SequenceParallel
from seqpar.requires import require
from seqpar_kernels.torch_internals import forward_hooks

require("trl", by="seqpar.integrations.trl", extra="trl")

import trl
from accelerate.utils import set_seed


class WholeCalls:
    """Two hooks of a model with which it is called as TRL calls it: with whole batches, for whole outputs.

    Calls while it attends on one device are left as they are, and so are those of its own parts.
    """

    def __init__(self, model: nn.Module, sp: SequenceParallel) -> None:
        self.sp = sp
        self.seed: int | None = None  # of attention dropout in calls to come
        for hooks in forward_hooks(
            model
        ):  # those of an earlier trainer would join outputs once more
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), WholeCalls):
                    del hooks[number]
        model.register_forward_pre_hook(self.shard, prepend=True, with_kwargs=True)
        model.register_forward_hook(self.join, with_kwargs=True)

    def shard(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Gives the model this rank's rows, and labels shifted, as TRL's head of it takes them."""
        if not self.sp.is_on or "seqpar" in kwargs:
            return None
        of_head = {n: kwargs[n] for n in ("fused_lm_head", "use_cache") if n in kwargs}
        # The documents by number, for layers with a state, which cannot be sharded: positions say them.
        batch = {n: x for n, x in kwargs.items() if n not in {*of_head, "seq_idx"}}
        inputs = self.sp.shard(batch, seed=self.seed)
        return args, inputs | of_head | {"shift_labels": inputs.labels}

    def join(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        """Puts what belongs to tokens together, in the order of the sequence."""
        # docs/design.md: each rank of a replica computes the whole loss
        call = kwargs.get("seqpar")
        if call is None or "shift_labels" not in kwargs:  # not sharded here
            return None
        # TRL's outputs have no column for the last row, which predicts nothing.
        end = -1 if kwargs["shift_labels"] is not None else None
        for name in list(outputs):
            x = outputs[name]
            is_of_tokens = isinstance(x, Tensor) and x.ndim >= 2
            whole = unshard_sequence(x, call.plan.layout, self.sp.group) if is_of_tokens else None
            outputs[name] = None if whole is None else whole[:, :end]
        return outputs


class Shared(OnReplicas):
    """What all of TRL's trainers need beside `OnReplicas`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.model is not None, "Trainer has refused that"
        self._called = [WholeCalls(self.model, self.sp)]
        reference = getattr(self, "ref_model", None)
        if reference is not None:
            self._called.append(WholeCalls(reference, SequenceParallel(reference, self.attend)))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step, and the sum over all processes of the tokens that count in them.

        A process that shares sequences counts them as its own: TRL multiplies by the number of processes.
        """
        batches = self.fetched(epoch_iterator, num_batches)
        count = self._get_num_items_in_batch(batches, device)
        divided_by = self.get_cp_size() * self.get_sp_size()
        return batches, None if count is None else count * divided_by

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """TRL's own loss, computed on every rank from log-probabilities of whole sequences."""
        with self.drawn_apart(model) as seed:
            for called in self._called:
                called.seed = seed
            return super().compute_loss(model, *args, **kwargs)


class SFTTrainer(Shared, trl.SFTTrainer):
    """`trl.SFTTrainer` on sequences that ranks share; it takes what that takes, and `attend`.

    See `seqpar.integrations.trainer.SequenceParallelTrainer` for `attend` and for what is refused.
    """


class DPOTrainer(Shared, trl.DPOTrainer):
    """`trl.DPOTrainer` on sequences that ranks share; it takes what that takes, and `attend`.

    See `seqpar.integrations.trainer.SequenceParallelTrainer` for `attend` and for what is refused.
    """


class GRPOTrainer(Shared, trl.GRPOTrainer):
    """`trl.GRPOTrainer` on sequences that ranks share; it takes what that takes, and `attend`.

    Every rank of a replica samples the same completions, on one device, and shares the sequences that it
    learns from. See `seqpar.integrations.trainer.SequenceParallelTrainer` for `attend` and what is refused.

    Raises:
        NotImplementedError: also where completions of a prompt lie in several replicas, or are compared with
            those of all processes, among which each counts once for each rank that has it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TRL counts the prompts of all processes, and has each draw apart.
        options: Any = copy.copy(self.args)
        options.generation_batch_size //= self.replicas.size
        self.args = options
        set_seed(options.seed + self.replicas.index)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        """Generates on one device."""
        with self.sp.on_one_device():
            return super()._generate_single_turn(*args, **kwargs)

    def _unsupported(self) -> dict[str, bool]:
        args: Any = self.args
        shared = self.replicas.size > 1
        rows = args.per_device_train_batch_size * args.steps_per_generation
        return super()._unsupported() | {
            "use_vllm, which samples for each process apart": shared and args.use_vllm,
            "scale_rewards='batch'": shared and self.scale_rewards == "batch",
            "multi_objective_aggregation='normalize_then_sum'": (
                shared and args.multi_objective_aggregation == "normalize_then_sum"
            ),
            "top_entropy_quantile": shared and self.top_entropy_quantile < 1.0,
            f"{rows} completions by process, which hold no whole number of the {self.num_generations} of a "
            "prompt (see per_device_train_batch_size and steps_per_generation)": (
                shared and rows % self.num_generations > 0
            ),
            f"{args.per_device_eval_batch_size} completions by process in evaluation, for "
            f"{self.num_generations_eval} of a prompt": (
                shared
                and self.eval_dataset is not None
                and args.per_device_eval_batch_size % self.num_generations_eval > 0
            ),
        }
