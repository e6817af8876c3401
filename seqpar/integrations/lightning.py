"""Lightning where ranks share sequences: strategies in which several processes are one replica.

Lightning takes every process for a replica, divides each loss by the number of micro-batches, and averages
gradients over all processes. Here the ranks of a replica are given the same batches, and the loss of a step
is one mean over the tokens of all replicas and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from seqpar.comm import Group, agreed
from seqpar.data import IGNORE
from seqpar.integrations.micro_batches import MicroBatches
from seqpar.integrations.samplers import check_sampler
from seqpar.loss import count_tokens, mean_loss
from seqpar.module import Attention
from seqpar.requires import require

require("lightning", by="seqpar.integrations.lightning", extra="lightning")

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.parallel import ParallelStrategy

if TYPE_CHECKING:
    from seqpar.integrations.transformers import SequenceParallel

# What processes must have alike.
COMPARED = (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "max_steps", "precision",
)  # fmt: skip


class OnReplicas(ParallelStrategy):
    """What both strategies have: replicas of several ranks, and losses that are weighed by their tokens.

    From `configure_model` on there are `attend`, the attention module over the ranks that share this rank's
    sequences, `everyone`, the group of all ranks, and `replicas`, their mesh ("dp", "sp").

    Args:
        attend: what makes an attention module of a group, such as `seqpar.RingAttention`.
        ranks: how many neighbours share a sequence; by default all.
        options: of the strategy of Lightning that this one is besides.
    """

    def __init__(
        self, attend: Callable[[Group], Attention], ranks: int | None = None, **options: Any
    ) -> None:
        if isinstance(attend, nn.Module) or not callable(attend):
            raise TypeError(
                "attend must make a module of a group, such as the class seqpar.RingAttention: there are no "
                f"groups before the trainer runs; got {attend!r}"
            )
        super().__init__(**options)
        self._make, self._ranks = attend, ranks
        self._is_set_up = False
        self._step = MicroBatches()

    def setup_environment(self) -> None:
        """Starts the processes' group, and says who shares sequences with whom."""
        super().setup_environment()
        if self._is_set_up:
            return
        self.everyone = Group.of()
        with agreed(self.everyone, operation=type(self).__name__) as claim:
            claim["ranks"] = ranks = self._ranks or self.everyone.size
            if ranks < 1 or self.everyone.size % ranks:
                raise ValueError(
                    f"every sequence must be shared by as many ranks: {self.everyone.size} processes are no "
                    f"multiple of ranks={ranks}"
                )
        shape = self.everyone.size // ranks, ranks
        self.replicas = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("dp", "sp"))
        self.attend = self._make(Group.of(self.replicas["sp"]))
        self._is_set_up = True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which replica of how many this rank is part of, for Lightning's samplers and one's own."""
        replicas = self.replicas["dp"]
        return {"num_replicas": replicas.size(), "rank": replicas.get_local_rank()}

    def process_dataloader(self, dataloader: object) -> object:
        """Takes a loader as it is. ValueError: it deals out batches to processes, not to replicas."""
        with agreed(self.everyone, operation="the data loader"):
            check_sampler(dataloader, **self.distributed_sampler_kwargs)
        return super().process_dataloader(dataloader)

    def setup(self, trainer: Trainer) -> None:
        """Sets up for training or evaluation, if processes have the same options.

        Raises:
            NotImplementedError: optimization is manual, or weights would be averaged and not gradients.
            DesyncError: options differ, or another process raised.
        """
        with agreed(self.everyone, operation="Trainer") as claim:
            claim |= {name: str(getattr(trainer, name)) for name in COMPARED}
            if not trainer.lightning_module.automatic_optimization:
                raise NotImplementedError(
                    "manual optimization is not supported on shared sequences: Lightning would not say which "
                    "micro-batches are a step; leave automatic_optimization on, or see docs/training.md"
                )
            if getattr(self, "_model_averaging_period", None) is not None:
                raise NotImplementedError(
                    "model_averaging_period averages weights, but the ranks of a replica have parts of one "
                    "gradient; leave it out"
                )
        self._step.forget()
        super().setup(trainer)

    def sequence_parallel(self, model: nn.Module) -> SequenceParallel:
        """A model of transformers on shared sequences, made in `configure_model`. All ranks must call."""
        from seqpar.integrations.transformers import SequenceParallel  # which needs transformers

        return SequenceParallel(model, self.attend)

    def loss(self, sp: SequenceParallel, batch: Mapping[str, Any], **options: Any) -> Tensor:
        """The loss of a model of transformers on a whole batch, as `mean_loss` has it. All ranks must call.

        Args:
            sp: what `sequence_parallel` has made.
            batch, options: as in `SequenceParallel.loss`, whose errors are raised.
        """
        inputs = sp.shard(batch, **options)
        logits = sp.model(**inputs, return_dict=True).logits
        loss = sp.loss_of(logits, inputs, everyone=self.everyone, gradients="mean")
        assert inputs.labels is not None, "loss_of has seen them"
        return self._weighed(loss, count_tokens(inputs.labels != IGNORE, self.everyone))

    def mean_loss(self, token_losses: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """The mean over the valid tokens of all ranks, for `training_step` to return. All ranks must call.

        It is that of a micro-batch of all replicas, and the same number on every rank. The gradients of a
        step are those of the mean over all tokens of its micro-batches.

        Args:
            token_losses: the loss of every token of this rank, not yet reduced, any shape.
            valid: which of them count; by default all.

        Raises:
            As `seqpar.mean_loss`.
        """
        loss = mean_loss(token_losses, self.everyone, valid=valid, gradients="mean")
        counted = torch.ones_like(token_losses, dtype=torch.bool) if valid is None else valid
        return self._weighed(loss, count_tokens(counted, self.everyone))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Goes forward; what one rank raises is an error on every rank.

        Raises:
            ValueError: the step has made its loss otherwise, or several where micro-batches are accumulated.
        """
        self._step.num_losses = 0
        # Ranks in the middle of a call hear along the axis that it runs over.
        with (
            agreed(self.everyone, operation="training_step"),
            agreed(self.attend.group, operation="training_step"),
        ):
            output = super().training_step(*args, **kwargs)
            if not self._step.num_losses:
                raise ValueError(
                    "training_step must return a loss of self.trainer.strategy.loss(...) or .mean_loss(...): "
                    "gradients of another one would be averaged over ranks that hold parts of a sequence"
                )
            if self._step.num_losses > 1 and self._num_micro_batches > 1:
                raise ValueError(
                    "a training_step must make one loss where micro-batches are accumulated, got "
                    f"{self._step.num_losses}, each of its own tokens: add up the losses of tokens before"
                )
        return output

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Goes through the last micro-batch, divides by the tokens of all, clips and steps."""

        def closed() -> Any:
            result = closure()
            assert self.model is not None, "it was set up"
            self._step.divide(self.model.parameters())
            return result

        return super().optimizer_step(optimizer, closed, *args, **kwargs)

    def _weighed(self, loss: Tensor, count: Tensor) -> Tensor:
        assert self.lightning_module is not None, "it was connected"
        if not self.lightning_module.trainer.training:
            return loss
        return self._step.weighed(loss, count, self._num_micro_batches)

    @property
    def _num_micro_batches(self) -> int:
        """What Lightning divides every loss by."""
        assert self.lightning_module is not None, "it was connected"
        return self.lightning_module.trainer.accumulate_grad_batches


class SequenceParallelStrategy(OnReplicas, DDPStrategy):
    """DDP over all processes, of which neighbours share sequences. For `Trainer(strategy=...)`.

    Args:
        attend, ranks: as in `OnReplicas`.
        options: of `lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        TypeError: attend is no class or function that makes a module.
        ValueError: when the trainer runs: ranks does not divide the number of processes.
    """


class SequenceParallelFSDPStrategy(OnReplicas, ModelParallelStrategy):
    """FSDP2 over all processes, of which neighbours share sequences: `fully_shard` in `configure_model`.

    Args:
        attend, ranks: as in `OnReplicas`.
        options: of `lightning.pytorch.strategies.ModelParallelStrategy`, without sizes.

    Raises:
        TypeError, ValueError: as `SequenceParallelStrategy`.
    """

    def setup_environment(self) -> None:
        """Starts the processes' group; Lightning's own mesh has the same shape."""
        ranks = self._ranks or self.world_size
        self._data_parallel_size, self._tensor_parallel_size = self.world_size // ranks, ranks
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Sets up, if all weights are sharded over all ranks, which sums their gradients.

        Raises:
            ValueError: they are not.
        """
        with agreed(self.everyone, operation="weights"):
            for name, p in trainer.lightning_module.named_parameters():
                mesh: Any = getattr(p, "device_mesh", None)
                if p.requires_grad and (mesh is None or mesh.size() != self.everyone.size):
                    raise ValueError(
                        f"{name} is not sharded over all {self.everyone.size} ranks, so its gradients would "
                        "not be summed: fully_shard(self.model) in configure_model, over all or over "
                        "self.trainer.strategy.replicas"
                    )
        super().setup(trainer)
