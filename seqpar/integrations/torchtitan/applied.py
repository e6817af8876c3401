"""`parallelize`: all that torchtitan applies to a model, with attention of seqpar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from seqpar.comm import Group, agreed
from seqpar.integrations.plain import check_plain
from seqpar.integrations.torchtitan.calls import Calls
from seqpar.integrations.torchtitan.models import replacements
from seqpar.layout import Layout, contiguous, zigzag
from seqpar.module import Attention

Parallelize = Callable[..., nn.Module]
# By torchtitan's name of a load balancer: the layout that its trainer shards sequences by.
LAYOUTS: dict[str | None, Callable[[int, int], Layout]] = {"headtail": zigzag, None: contiguous}


def parallelize(apply: Parallelize, attend: Callable[[Group], Attention]) -> Parallelize:
    """A `parallelize_fn` of a ModelSpec that applies all that another one does, with attention of seqpar.

    With a context parallel degree of 1 it is that other one. Losses, gradient norms and weights are those of
    one process that has the sequences of all replicas. Calls of the model refuse sequences of another length
    than `training.seq_len`, positions that were not sharded as the load balancer says, and masks, since those
    are made of the positions.

    Args:
        apply: the function for the model, such as `parallelize_llama`: the one that the spec has.
        attend: makes the attention of the ranks along "cp", such as `seqpar.RingAttention`.

    Raises:
        NotImplementedError: where what is returned is called: the model's attention or masks are not known
            here, or pipelines, CUDA graphs or the load balancer "ptrr" are asked for.
        TypeError, ValueError: there too: `attend` makes no attention, or attention over other ranks, or with
            a mask, score or dropout of its own.
        DesyncError: another rank raised one of these.
    """

    def applied(model: nn.Module, *, parallel_dims: Any, **configs: Any) -> nn.Module:
        if parallel_dims.cp > 1:
            _share_sequences(model, attend, parallel_dims, **configs)
            if parallel_dims.spmd_backend == "partial_dtensor":
                parallel_dims = _NothingToApply(parallel_dims)
        return apply(model, parallel_dims=parallel_dims, **configs)

    return applied


class _NothingToApply:
    """The parallel dimensions, for a function that asks them whether to apply context parallelism itself.

    With "partial_dtensor" it would wrap inner attention by hand. The degree and the meshes, over which FSDP
    shards, stay what they are.
    """

    cp_enabled = False

    def __init__(self, dims: Any) -> None:
        self._dims = dims

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dims, name)


def _share_sequences(
    model: Any,
    attend: Callable[[Group], Attention],
    dims: Any,
    *,
    training: Any,
    parallelism: Any,
    **_: Any,
) -> None:
    """Puts attention over the ranks along "cp" into a model, and sees that it is told its masks."""
    group = Group.of(dims.get_mesh("cp"))
    balancer = parallelism.context_parallel_load_balancer
    with agreed(Group.of(dims.world_mesh), operation="parallelize"):
        wrong = {
            f"parallelism.context_parallel_load_balancer={balancer!r}; take 'headtail' or None": (
                balancer not in LAYOUTS
            ),
            "pipelines; take parallelism.pipeline_parallel_degree=1": dims.pp > 1,
            "CUDA graphs, which would replay the masks of the first step; set "
            "training.disable_cuda_graphs": not training.disable_cuda_graphs,
        }
        if found := [text for text, is_so in wrong.items() if is_so]:
            raise NotImplementedError(f"not with attention of seqpar: {'; '.join(found)}")
        replaced = replacements(model, group)
        attended = attend(group)
        if not isinstance(attended, Attention):
            raise TypeError(
                f"attend must make a module such as seqpar.RingAttention, got {attended!r}"
            )
        if attended.group.transport.global_ranks != group.transport.global_ranks:
            raise ValueError(
                f"attend must be over the group that it is given, of ranks "
                f"{group.transport.global_ranks}, got {attended.group.transport.global_ranks}"
            )
        check_plain(attended)
    for module, inner in replaced:
        module.inner_attention = inner
    windows = {inner.window for _, inner in replaced}
    calls = Calls(attended, LAYOUTS[balancer](training.seq_len, dims.cp), windows)
    model.get_attention_masks = _no_masks
    model.register_forward_pre_hook(calls, with_kwargs=True)


def _no_masks(positions: Tensor) -> None:
    """In place of `Decoder.get_attention_masks`: the trainer would shard what that makes."""
