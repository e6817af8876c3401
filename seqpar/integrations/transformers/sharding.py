"""`Sharding`: from a batch that every rank holds whole to this rank's arguments and its plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from seqpar.comm import agreed
from seqpar.data import IGNORE, Labels, shard_batch, shard_sequence
from seqpar.integrations.transformers.attention.call import Call
from seqpar.integrations.transformers.attention.patterns import as_bytes
from seqpar.integrations.transformers.documents import (
    PACKED,
    documents_of,
    masked,
    seen_tokens,
)
from seqpar.integrations.transformers.inputs import Inputs
from seqpar.integrations.transformers.probe.findings import Findings
from seqpar.integrations.transformers.probe.tokens import common_arguments, padding_token
from seqpar.integrations.transformers.scaling import check_scaling
from seqpar.integrations.transformers.tables import check_positions, check_tokens
from seqpar.layout import Layout, LayoutKind, Mask
from seqpar.module import Attention
from seqpar.replicas import content_hash

TOKENS = ("input_ids", "inputs_embeds")


@dataclass(frozen=True, eq=False)
class Sharding:
    """Shards the batches of one model; see `SequenceParallel.shard`."""

    attend: Attention
    model: PreTrainedModel
    stack: PreTrainedModel
    findings: Findings

    def shard(
        self,
        batch: Mapping[str, Any],
        *,
        kind: LayoutKind | None,
        multiple_of: int,
        labels: Labels | None,
        seed: int | None,
        whole: Iterable[str],
        sequences: Sequence[str],
        shifted: Sequence[str],
    ) -> Inputs:
        """Gives this rank's arguments, labels, layout and what is beside. All ranks must call."""
        given = {name: x for name, x in batch.items() if x is not None}
        group, causal = self.attend.group, self.findings.causal
        with agreed(group, operation="shard") as claim:
            shape = self._shape(given)
            batch = given
            if self.is_sharded_inside:
                batch = text_of(given, shape, named=(*sequences, *shifted))
                others = {
                    n: x for n, x in given.items() if n not in batch and isinstance(x, Tensor)
                }
                # Pixels that were augmented apart would be other features on each rank.
                claim |= {
                    f"batch[{n!r}]": (tuple(x.shape), content_hash(x)) for n, x in others.items()
                }
            documents = documents_of(batch, shape, causal=causal, packs=self.findings.packs)
            seen = seen_tokens(batch.get("attention_mask"), shape)
            labels = self._labels(batch, labels)
            _check_hidden_labels(batch, seen, labels)
            claim |= {"documents": documents, "seed": seed}
            claim["seen"] = None if seen is None else as_bytes(seen)
            if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
                raise TypeError(f"seed must be an integer or None, got {seed!r}")

            check_tokens(self.model, self.stack, batch.get("input_ids"))
            positions = self._positions(batch, seen)

        rows = tuple(documents) if len(set(documents)) > 1 else (documents[0],)
        rest = {n: x for n, x in batch.items() if n not in ("attention_mask", *PACKED)} | positions
        arguments, layout = shard_batch(
            rest,
            group,
            ("zigzag" if causal else "contiguous") if kind is None else kind,
            multiple_of=multiple_of,
            mask=masked(Mask(causal), rows, shape[1]),
            whole=whole,
            labels=labels or "own",
            sequences=sequences,
            shifted=shifted,
        )
        with agreed(group, operation="shard: positions"):
            if not all(layout.rows):
                raise ValueError(
                    "every rank needs a token, since layers of transformers do not take empty sequences; "
                    f"{layout} gives {layout.rows}"
                )
            check_positions(self.stack, rest.get("position_ids"), layout.length)
            check_scaling(self.stack.config, rest.get("position_ids"), layout)
        mask = self._mask(arguments, seen, layout)
        plan = self.attend.plan(layout)
        all_hidden = None if seen is None else as_bytes(seen)
        call = Call(plan, rows, as_bytes(mask), seed, self.findings.numbers, all_hidden)
        for each in self.findings.masks:
            call.mask(*each)
        own = arguments.pop("labels", None)
        beside = {name: arguments.pop(name) for name in (*sequences, *shifted)}
        if self.is_sharded_inside:
            shown = arguments["position_ids"].new_ones(shape)
            mask = given.get("attention_mask", shown)
            arguments = {n: x for n, x in given.items() if n not in (*beside, *PACKED, "labels")}
        arguments |= common_arguments(self.model, attention_mask=mask, seqpar=call)
        return Inputs(arguments, own, layout, beside)

    @property
    def is_sharded_inside(self) -> bool:
        """Whether the model is given whole sequences, which it shards where its text layers begin."""
        return self.stack is not self.model

    def _shape(self, batch: Mapping[str, Any]) -> tuple[int, int]:
        tokens = next((batch[name] for name in TOKENS if isinstance(batch.get(name), Tensor)), None)
        if tokens is None or tokens.ndim < 2:
            raise ValueError(
                f"a batch needs input_ids or inputs_embeds [b s ...], got {sorted(batch)}"
            )
        if tokens.shape[1] < self.attend.group.size:
            raise ValueError(
                f"every rank needs a token, since layers of transformers do not take empty sequences; got "
                f"{tokens.shape[1]} for {self.attend.group.size} ranks"
            )
        return int(tokens.shape[0]), int(tokens.shape[1])

    def _labels(self, batch: Mapping[str, Any], labels: Labels | None) -> Labels | None:
        chosen = labels or self.findings.labels
        if chosen is None and "labels" in batch:
            raise ValueError(
                f"whether the labels of {type(self.model).__name__} are of the next token or of its own is "
                "not known; say labels='next' or 'own'"
            )
        return chosen

    def _positions(self, batch: Mapping[str, Any], seen: Tensor | None) -> dict[str, Tensor]:
        """Counts positions as the model does itself, where that is not 0, 1, ... and none are given."""
        first, tokens = self.findings.first_position, batch.get("input_ids")
        if "position_ids" in batch or (first == 0 and not self.findings.counts_seen):
            return {}
        shown = torch.ones(self._shape(batch), dtype=torch.bool) if seen is None else seen.cpu()
        is_padding = (
            tokens.cpu() == padding_token(self.model) if tokens is not None and first else ~shown
        )
        if (
            (tokens is None and first)
            or not bool(shown[:, 0].all())
            or bool((shown & is_padding).any())
        ):
            raise NotImplementedError(
                f"{type(self.model).__name__} counts positions from {first} over what is not padding; "
                "pad on the right and hide it with attention_mask, or give position_ids"
            )
        if not bool((shown[:, :-1] >= shown[:, 1:]).all()):
            raise NotImplementedError(
                f"{type(self.model).__name__} counts positions over what attention_mask shows, and it hides "
                "tokens between others; give position_ids"
            )
        if first == 0 or tokens is None:
            return {}
        counted = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        return {"position_ids": counted.expand(tokens.shape).contiguous()}

    def _mask(self, arguments: Mapping[str, Any], seen: Tensor | None, layout: Layout) -> Tensor:
        """Shards the attention_mask, or one that hides nothing where the batch has none."""
        positions = arguments["position_ids"]
        if seen is None:
            return torch.ones_like(positions)
        rank = self.attend.group.rank
        return shard_sequence(seen.to(positions), layout, rank)


def text_of(
    batch: Mapping[str, Any], shape: tuple[int, int], *, named: Iterable[str]
) -> dict[str, Any]:
    """What a batch of a model of several parts says of its text: tokens, mask, labels, and what is named.

    Its positions may be `[3 b s]`, those of time, height and width, or `[4 b s]`, of which those of the text
    come first.
    """
    names = (*TOKENS, "attention_mask", "labels", *PACKED, *named)
    text = {name: batch[name] for name in names if name in batch}
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor):
        if tuple(positions.shape) == (4, *shape):
            text["position_ids"] = positions[0]
        elif tuple(positions.shape) != (3, *shape):
            text["position_ids"] = positions
    return text


def _check_hidden_labels(
    batch: Mapping[str, Any], seen: Tensor | None, labels: Labels | None
) -> None:
    """Refuses labels whose logits come from a hidden token: such a row means nothing."""
    if seen is None or "labels" not in batch or bool(seen.all()):
        return
    counted = batch["labels"] != IGNORE
    if labels == "next":
        counted = torch.nn.functional.pad(counted[:, 1:], (0, 1), value=False)
    wrong = torch.nonzero(counted & ~seen.to(counted.device))
    if len(wrong):
        row, at = wrong[0].tolist()
        what = f"token {at + 1} is predicted by token {at}" if labels == "next" else f"token {at}"
        raise ValueError(
            f"in row {row}, {what}, which attention_mask hides; a label that must not count is {IGNORE}"
        )
