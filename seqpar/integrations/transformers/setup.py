"""`SequenceParallel`: a transformers model whose sequences are sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from seqpar.comm import Group, agreed
from seqpar.data import IGNORE, Labels, fingerprint
from seqpar.gradients import summed_gradients
from seqpar.integrations.plain import check_plain
from seqpar.integrations.transformers.attention.guard import Guard
from seqpar.integrations.transformers.attention.registration import NAME, register
from seqpar.integrations.transformers.attention.replacement import Replacement, handover_of
from seqpar.integrations.transformers.boundary import Boundary
from seqpar.integrations.transformers.inputs import Inputs
from seqpar.integrations.transformers.internals import attention_name
from seqpar.integrations.transformers.probe.config import (
    check_config,
    check_own_config,
    inner_model,
    text_stack,
)
from seqpar.integrations.transformers.probe.trial import try_out
from seqpar.integrations.transformers.sharding import Sharding
from seqpar.integrations.transformers.wrappers import Outermost
from seqpar.layout import LayoutKind
from seqpar.loss import Reduction, check_reduction, mean_loss
from seqpar.module import Attention
from seqpar.replicas import same_weights
from seqpar_kernels import accumulation_dtype

TokenLosses = Callable[[Tensor, Tensor], Tensor]


class SequenceParallel:
    """A model of transformers whose attention runs over the ranks of a group. All ranks must make one.

    The model is switched in place to the attention implementation "seqpar". It may be wrapped (PEFT, DDP,
    torch.compile) or sharded in place (FSDP2), before or after; `loss` calls what was wrapped round it. It is
    run here five times on a few tokens, to see that its rows do not depend on each other outside of
    attention, that its outputs stay what they were, and which label its own loss compares a row with.

    Args:
        model: with its weights; each rank's own.
        attend: how the ranks work together, such as `seqpar.RingAttention(group)`. Masks, scores and
            dropout come from the model, so it must have none.
        tp: the ranks that hold the same rows, and shards of the weights: they are to be given the same
            batches. What `replace_attention` was given need not be said again.

    Raises:
        NotImplementedError: the model does what sharding cannot honour; the layer is named.
        ValueError: `attend` has a mask, score or dropout, or the weights are not loaded, or tp has other
            ranks than its attention was replaced for.
        TypeError: there is no transformers model, or `attend` is not a module of seqpar.
        DesyncError: ranks differ in model or strategy, or in weights that they should share, or another
            rank raised one of the above.
    """

    def __init__(self, model: nn.Module, attend: Attention, *, tp: Group | None = None) -> None:
        if not isinstance(attend, Attention):
            raise TypeError(
                f"attend must be a module such as seqpar.RingAttention(group), got {attend!r}"
            )
        self._outermost = Outermost(model)
        self.attend, self.group = attend, attend.group
        handover = handover_of(model)
        replaced_over = tp if handover is None else handover.group
        self.tp = replaced_over or Group.alone()
        with agreed(*self._axes, operation="SequenceParallel") as claim:
            if tp is not None and tp.transport.global_ranks != self.tp.transport.global_ranks:
                raise ValueError(
                    f"tp has ranks {tp.transport.global_ranks}, attention was replaced for "
                    f"{self.tp.transport.global_ranks}"
                )
            self.inner = inner_model(model)
            claim |= {"model": type(self.inner).__name__, "strategy": attend.strategy}
            shared = {
                p
                for m in self.inner.modules()
                if isinstance(m, Replacement)
                for p in m.parameters()
            }
            claim["parameters"] = sum(p.numel() for p in self.inner.parameters() if p not in shared)
            check_plain(attend)
            check_config(model, self.inner)
            self.stack = text_stack(self.inner)
            check_own_config(self.stack)
            register()
            if self.stack is not self.inner:
                Boundary().watch(self.stack)
        with agreed(*self._axes, operation="SequenceParallel: weights"):
            same_weights(self.inner, self.group)  # ranks of tp hold other shards
        with agreed(*self._axes, operation="SequenceParallel: trying out") as claim:
            before = attention_name(self.stack.config)
            self._before = "sdpa" if before == NAME else before
            try:
                self.findings = try_out(self.inner, self.stack)
            except BaseException:
                if handover is None:
                    self.stack.set_attn_implementation("eager" if before == NAME else before)
                raise
            claim["findings"] = self.findings
        Guard(self.group, self.tp, self.stack).watch(self.inner)

    @classmethod
    def from_accelerator(
        cls, model: nn.Module, accelerator: Any, attend: Attention | Callable[[Group], Attention]
    ) -> SequenceParallel:
        """Makes one for the processes that share sequences under accelerate. Before `accelerator.prepare`.

        Args:
            accelerator: an `accelerate.Accelerator`; it then deals out batches to processes that share
                sequences together, see `seqpar.integrations.accelerate.share_sequences`.
            attend: how they share them: a module, or what makes one of a group, such as `RingAttention`.

        Raises:
            As `SequenceParallel` and `share_sequences`.
        """
        from seqpar.integrations.accelerate import share_sequences  # which needs accelerate

        return cls(model, share_sequences(accelerator, attend)[0])

    def shard(
        self,
        batch: Mapping[str, Any],
        *,
        kind: LayoutKind | None = None,
        multiple_of: int = 1,
        labels: Labels | None = None,
        seed: int | None = None,
        whole: Iterable[str] = (),
        sequences: Iterable[str] = (),
        shifted: Iterable[str] = (),
    ) -> Inputs:
        """This rank's keyword arguments for the model, from a batch that every rank holds whole.

        Padding (`attention_mask`) and packing (`position_ids` that start anew, `cu_seq_lens_q` and
        `cu_seq_lens_k`) are honoured in every layer. All ranks must call.

        Args:
            batch: what the model takes on one device, labels included, see `seqpar.shard_batch`.
            kind: of layout, as in `seqpar.shard_batch`; by default "zigzag" for causal models, else
                "contiguous".
            multiple_of: shards are cut at multiples of this many positions.
            labels: "next" or "own", as in `seqpar.shard_batch`; by default what the model's own loss was
                found to do when this was made.
            seed: of attention dropout, another for every step; needed only where the model drops weights.
            whole: names of tensors to pass on unsharded.
            sequences, shifted: names of more tensors `[b s ...]`, as in `seqpar.shard_batch`. The model does
                not get them: they are in `beside` of what is returned.

        Raises:
            ValueError: the batch contradicts itself, or has fewer tokens than there are ranks, or labels
                at tokens that attention_mask hides, or labels must be said; and what `shard_batch` does.
            NotImplementedError: the mask is not made of documents, or positions would be scaled by what a
                rank holds instead of the whole.
            DesyncError: ranks differ in their batch or options, or another rank raised one of the above.
        """
        sharding = Sharding(self.attend, self.inner, self.stack, self.findings)
        with agreed(self.tp, operation="shard, over tp") as claim:
            sequences, shifted = sorted(sequences), sorted(shifted)
            claim |= {"sequences": sequences, "shifted": shifted}
            inputs = sharding.shard(
                batch,
                kind=kind,
                multiple_of=multiple_of,
                labels=labels,
                seed=seed,
                whole=whole,
                sequences=sequences,
                shifted=shifted,
            )
            claim["layout"] = inputs.layout
            tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
            claim |= {f"batch[{name!r}]": fingerprint(x) for name, x in tensors.items()}
        return inputs

    def loss(
        self,
        batch: Mapping[str, Any],
        *,
        everyone: Group | None = None,
        gradients: Reduction = "sum",
        num_tokens: Tensor | int | None = None,
        token_losses: TokenLosses | None = None,
        **options: Any,
    ) -> Tensor:
        """The model's loss on a batch: cross entropy, the mean over the tokens of all ranks that count.

        The same number on every rank. Gradients of one device are the *sum* over ranks of what backward
        gives: `seqpar.sum_gradients(model.parameters(), everyone)`. All ranks must call.

        Args:
            batch: with labels, unshifted, as the model takes them on one device.
            everyone: the ranks of all replicas, where there is data parallelism: the mean is over the tokens
                of all. By default those that share the sequence.
            gradients, num_tokens: of `seqpar.mean_loss`: "mean" for what averages gradients, as DDP and FSDP
                do; the tokens of all micro-batches of a step.
            token_losses: the loss `[rows]` of each of the logits `[rows, classes]` here and their labels
                `[rows]`, in which -100 does not count; by default cross entropy, in float32 or wider. For
                logits that a policy leaves sharded: `vocabulary_cross_entropy` with its group.
            options: of `shard`.

        Raises:
            ValueError: the batch has no labels, or logits are sharded by vocabulary and token_losses is not
                given; and what `shard` does.
            NotImplementedError: the model's own loss is not cross entropy of a token; and as `shard`.
        """
        with agreed(*self._axes, operation="loss") as claim:
            self._check_loss(batch.get("labels"), f"the batch, got {sorted(batch)}")
            model = self.model
            claim["the model that is called"] = type(model).__name__
        inputs = self.shard(batch, **options)
        return self.loss_of(
            model(**inputs, return_dict=True).logits,
            inputs,
            everyone=everyone,
            gradients=gradients,
            num_tokens=num_tokens,
            token_losses=token_losses,
        )

    def loss_of(
        self,
        logits: Tensor,
        inputs: Inputs,
        *,
        everyone: Group | None = None,
        gradients: Reduction = "sum",
        num_tokens: Tensor | int | None = None,
        token_losses: TokenLosses | None = None,
    ) -> Tensor:
        """The loss of logits that the model gave for what `shard` made of a batch. All ranks must call.

        For loops that call the model themselves; `loss` does all of it.

        Args:
            logits: `[b sl classes]`.
            inputs: of `shard`, with labels.
            everyone, gradients, num_tokens, token_losses: as in `loss`.

        Raises:
            ValueError, NotImplementedError: as `loss`.
        """
        everyone = everyone or self.group
        # A label out of range is one rank's alone, along either axis.
        with agreed(self.tp, everyone, operation="loss: tokens"):
            self._check_loss(inputs.labels, "the batch that was sharded")
            assert inputs.labels is not None, "it was looked at"
            labels = inputs.labels.flatten().to(logits.device)
            if token_losses is None:
                self._check_classes(logits)
            losses = (token_losses or cross_entropy)(logits.flatten(0, 1), labels)
        return mean_loss(
            losses, everyone, valid=labels != IGNORE, num_tokens=num_tokens, gradients=gradients
        )

    def backward(self, loss: Tensor, *, everyone: Group | None = None) -> None:
        """Goes backward, and makes the gradients of the model's parameters those of one device: their sum.

        All ranks must call, once a step. Several micro-batches go in one block of `summed_gradients`, with
        `loss.backward()` for each. Raises what `seqpar.summed_gradients` does.

        Args:
            loss: that of `loss`, or this rank's share of another.
            everyone: as in `loss`.
        """
        with self.summed_gradients(everyone=everyone):
            check_reduction(loss)
            loss.backward()

    @contextmanager
    def summed_gradients(self, *, everyone: Group | None = None) -> Iterator[None]:
        """A block of backwards, after which gradients are summed over ranks: one step. All ranks must enter.

        It is `seqpar.summed_gradients` of the model, and raises what that does.

        Args:
            everyone: as in `loss`.
        """
        with agreed(*self._axes, operation="summed_gradients: the model"):
            model = self.model
        axes = self._axes if everyone else (self.tp,)
        with summed_gradients(model, everyone or self.group, axes=axes):
            yield

    @property
    def model(self) -> nn.Module:
        """The model that it was given, or DDP, FSDP or torch.compile around it if that came later."""
        return self._outermost()

    @contextmanager
    def on_one_device(self) -> Iterator[None]:
        """Has the model attend as it did before, inside of a `with`: for generation, by each rank alone."""
        self.stack.set_attn_implementation(self._before)
        try:
            yield
        finally:
            self.stack.set_attn_implementation(NAME)

    @property
    def is_on(self) -> bool:
        """Whether the model attends over ranks, and was not switched back to one device."""
        return attention_name(self.stack.config) == NAME

    @property
    def _axes(self) -> tuple[Group, Group]:
        """The ranks that share heads with this one, and those that share the sequence."""
        return self.tp, self.group

    def _check_loss(self, labels: Tensor | None, where: str) -> None:
        if labels is None:
            raise ValueError(f"loss needs labels in {where}")
        if self.findings.labels is None or hasattr(self.inner, "_loss_function"):
            raise NotImplementedError(
                f"the loss of {type(self.inner).__name__} is not the cross entropy of each token, as a trial "
                "of the model with labels found; compute it from model(**sp.shard(batch, labels=...)) and "
                "reduce it with seqpar.mean_loss"
            )

    def _check_classes(self, logits: Tensor) -> None:
        classes = getattr(self.inner.get_output_embeddings(), "out_features", logits.shape[-1])
        if logits.shape[-1] != classes:
            raise ValueError(
                f"logits must have all {classes} classes, got {logits.shape[-1]} of them; where a policy "
                "leaves them sharded, give token_losses=, such as vocabulary_cross_entropy with its group"
            )


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The loss of each row `[rows, classes]`, 0 where its label is -100, in float32 or wider."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    return F.cross_entropy(
        wide, labels, reduction="none", ignore_index=IGNORE, label_smoothing=label_smoothing
    )
