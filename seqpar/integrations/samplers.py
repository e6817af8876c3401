"""`check_sampler`: whether a loader deals out batches to replicas, where these are several processes."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset


def check_sampler(loader: object, num_replicas: int, rank: int) -> None:
    """Refuses a loader whose sampler counts anything but replicas.

    Each process reads a stream by itself, so nothing is known of those.

    Raises:
        ValueError: batches are dealt out to processes, or not at all.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    inner = getattr(loader.batch_sampler, "sampler", None)
    candidates: tuple[Any, ...] = loader.sampler, loader.batch_sampler, inner
    samplers = [x for x in candidates if hasattr(x, "num_replicas")]
    for x in samplers:
        if (x.num_replicas, x.rank) != (num_replicas, rank):
            raise ValueError(
                f"{type(x).__name__} deals out to {x.num_replicas} processes, of which this is {x.rank}, but "
                f"there are {num_replicas} replicas, and this is part of {rank}: leave the sampler to "
                "Lightning, or give it **trainer.strategy.distributed_sampler_kwargs"
            )
    if not samplers and num_replicas > 1:
        raise ValueError(
            f"the loader would give all {num_replicas} replicas the same batches: leave "
            "use_distributed_sampler on, or take a DistributedSampler of "
            "**trainer.strategy.distributed_sampler_kwargs"
        )
