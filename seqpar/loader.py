"""`ShardedLoader`: the batches of any data loader, each as the rows that this rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from seqpar.comm import Ranks, agreed, group_of
from seqpar.data import Labels, shard_batch
from seqpar.layout import Layout, LayoutKind, Mask, check_kind


class ShardedLoader:
    """Yields (batch, layout) as `seqpar.shard_batch` makes them of the batches of a loader.

    All ranks of `group` must load the same batches, in the same order; replicas must load others, which
    `torch.utils.data.DistributedSampler(dataset, num_replicas=dp, rank=replica)` deals out: the number
    of *replicas*, not of processes. Ranks that load different batches are found before the batch is used.

    A batch may hold its own `seqpar.Mask` under "mask", made where the batch is made (`collate_fn`): it
    is passed on, and used here.

    Args:
        loader: a `torch.utils.data.DataLoader`, or any iterable of dictionaries.
        group: the ranks that share each sequence: a `seqpar.Group`, a process group or a mesh dimension.
        kind, multiple_of, mask, pad_to_multiple_of, pad_token_id, whole, labels, labels_ahead, sequences,
            shifted: as in `seqpar.shard_batch`.
        everyone: the ranks of all replicas, given as `group` is. With it, replicas whose batches end at
            different steps are an error on every rank; without it they leave each other waiting in the next
            reduction.

    Raises:
        ValueError: kind is a name of no layout; and of a mesh or process group what `Attention` raises.
        TypeError: kind or group is of the wrong kind.
        DesyncError: while iterating: ranks differ in their batches, some have no more, or another rank
            raised. Errors of the loader and of `shard_batch` are raised where they happen.
    """

    def __init__(
        self,
        loader: Iterable[Mapping[str, Any]],
        group: Ranks,
        kind: LayoutKind = "zigzag",
        *,
        multiple_of: int = 1,
        mask: Mask | Sequence[Mask] | None = None,
        pad_to_multiple_of: int | None = None,
        pad_token_id: int | None = None,
        whole: Iterable[str] = (),
        labels: Labels = "next",
        labels_ahead: int | None = None,
        sequences: Iterable[str] = (),
        shifted: Iterable[str] = (),
        everyone: Ranks | None = None,
    ) -> None:
        check_kind(kind)
        self.loader, self.group, self.kind, self.mask = loader, group_of(group), kind, mask
        self.everyone = self.group if everyone is None else group_of(everyone)
        self.multiple_of, self.labels, self.whole = multiple_of, labels, tuple(whole)
        self.pad_to_multiple_of, self.pad_token_id = pad_to_multiple_of, pad_token_id
        self.labels_ahead = labels_ahead
        self.sequences, self.shifted = tuple(sequences), tuple(shifted)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Layout]]:
        batches = iter(self.loader)
        while True:
            with agreed(self.everyone, operation="ShardedLoader") as claim:
                batch = next(batches, None)
                claim["has a batch"] = batch is not None
            if batch is None:
                return
            if self.everyone is self.group:
                shard = self._shard(batch)
            else:  # a batch that one replica refuses is an error in all
                with agreed(self.everyone, operation="ShardedLoader: shard"):
                    shard = self._shard(batch)
            yield shard

    def _shard(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Layout]:
        mask = batch.get("mask")
        return shard_batch(
            batch,
            self.group,
            self.kind,
            multiple_of=self.multiple_of,
            mask=mask if _are_masks(mask) else self.mask,
            pad_to_multiple_of=self.pad_to_multiple_of,
            pad_token_id=self.pad_token_id,
            whole=self.whole,
            labels=self.labels,
            labels_ahead=self.labels_ahead,
            sequences=self.sequences,
            shifted=self.shifted,
        )

    def __len__(self) -> int:
        """How many batches an epoch has, where the loader knows."""
        return len(self.loader)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Tells the loader's sampler, batch sampler or dataset which epoch comes next.

        Call it on every rank before every epoch: samplers that shuffle then draw another order, and the
        same one when a run is resumed.

        Raises:
            TypeError: nothing in the loader has a `set_epoch`, so every epoch would have one order.
        """
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        parts: list[Any] = [getattr(self.loader, name, None) for name in ("sampler", "dataset")]
        parts += [self.loader, batch_sampler, getattr(batch_sampler, "sampler", None)]
        setters = {id(p): p.set_epoch for p in parts if hasattr(p, "set_epoch")}
        if not setters:
            raise TypeError(
                f"no sampler and no dataset of {type(self.loader).__name__} has a set_epoch; "
                "a DistributedSampler with num_replicas= and rank= has"
            )
        for set_epoch in setters.values():
            set_epoch(epoch)


def _are_masks(x: object) -> bool:
    """Whether it is a mask, or one for each batch entry, and no tensor of the batch by that name."""
    return isinstance(x, Mask) or (
        isinstance(x, (list, tuple)) and all(isinstance(m, Mask) for m in x)
    )
