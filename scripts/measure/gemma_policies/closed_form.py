"""The closed form of a job: `seqpar.tensor_parallel.volume`, adapters, and weights that travel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TypeAlias

from gemma_policies.gemma import HEADS, Setting
from gemma_policies.run import Job
from gemma_policies.ways import Way
from seqpar.tensor_parallel.collectives import Kind, sent_fraction
from seqpar.tensor_parallel.volume import Sizes, contracted_volume, megatron_volume

Counts: TypeAlias = Mapping[Kind, Fraction]
Both: TypeAlias = tuple[Counts, Counts]  # forward, backward
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}


def formula(setting: Setting, way: Way, job: Job, num_ranks: int) -> Both:
    """Elements that a rank sends by kind, forward and backward; of one token where it generates."""
    if not way.is_cut:
        return {}, {}
    tp = num_ranks // way.data
    parts = [everything(setting, way, job, tp)]
    if job == "LoRA step":
        parts.append(adapters(setting, way, tp))
    if way.data > 1:
        parts.append(weights(setting, job, tp, way.data))
    forward, backward = (_total(side) for side in zip(*parts, strict=True))
    return forward, backward


def everything(setting: Setting, way: Way, job: Job, tp: int) -> Both:
    """As if all weights learned, or of one token."""
    is_training = job != "generation"
    tokens = setting.batch * setting.length // way.data if is_training else 1
    sizes = Sizes(
        tokens, setting.width, HEADS, HEADS, setting.head_dim, setting.hidden, setting.vocabulary,
        setting.layers,
    )  # fmt: skip
    volume_of = contracted_volume if way.name == "contracted" else megatron_volume
    volume = volume_of(sizes, tp, logits="sharded" if is_training else "whole")
    return volume.by_kind("forward"), volume.by_kind("backward") if is_training else {}


def adapters(setting: Setting, way: Way, tp: int) -> Both:
    """What is all-reduced more than if all weights learned; less counts as negative.

    A is cut with its layer's input and B with its output, so r numbers of each token travel, forward where A
    is cut and backward where B is. Nothing learns before the first adapter: nothing is sent back to there.
    """
    tokens = setting.batch * setting.length // way.data
    targets = set(setting.targets)
    thin = setting.layers * tokens * setting.lora_rank
    into, out = len(targets & (ATTENTION | MLP)), len(targets - ATTENTION - MLP)
    before_mlp = bool(targets & (ATTENTION | {"o_proj"}))
    if way.name == "contracted":
        unsent = tokens * (1 + (not before_mlp))  # of the first norms
        if not targets & ATTENTION:
            unsent += tokens * HEADS * setting.head_dim  # the input of o
        if not (before_mlp or targets & MLP):
            unsent += tokens * setting.hidden  # the input of down
        more = thin * into, thin * out - unsent
    else:
        unsent = tokens * setting.width * (1 + (not before_mlp))  # inputs of the first blocks
        more = thin * out, thin * into - unsent
    share = sent_fraction("all_reduce", tp)
    return {"all_reduce": share * more[0]}, {"all_reduce": share * more[1]}


def weights(setting: Setting, job: Job, tp: int, data: int) -> Both:
    """What weights send that are spread over `data` ranks: gathered for use, their gradients scattered.

    Those of a layer are gathered again for backward. What is outside of layers stays once it is gathered, so
    that it does not travel for a token that is not the first.
    """
    D, q, F = setting.width, HEADS * setting.head_dim, setting.hidden
    layer = (4 * D * q + 3 * D * F) // tp + 2 * D
    rest = setting.vocabulary * D // tp + D
    thin = 0  # rows of A and columns of B, on a rank
    for target in setting.targets:
        cut = q if target in ATTENTION | {"o_proj"} else F  # the one width of the two that is not D
        thin += D + cut // tp
    adapter = setting.lora_rank * thin
    if job == "LoRA step":
        gathered, learning = setting.layers * (layer + adapter), setting.layers * adapter
    else:
        gathered, learning = setting.layers * layer, setting.layers * layer + rest
    once = sent_fraction("all_gather", data) / data
    if job == "generation":
        return {"all_gather": once * gathered}, {}
    scattered = sent_fraction("reduce_scatter", data) * learning
    return (
        {"all_gather": once * (gathered + rest)},
        {"all_gather": once * gathered, "reduce_scatter": scattered},
    )


def _total(parts: Iterable[Counts]) -> Counts:
    """All of them together; kinds that send nothing are left out."""
    total: dict[Kind, Fraction] = {}
    for part in parts:
        for kind, elements in part.items():
            total[kind] = total.get(kind, Fraction(0)) + elements
    return {kind: elements for kind, elements in total.items() if elements}
