"""The closed form of a job: the product's for all weights, and what adapters change in it."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TypeAlias

from policies.model import HEADS, Setting
from policies.run import Job
from policies.ways import Way
from seqpar.comm.collectives import Kind, sent_fraction
from seqpar.tensor_parallel.volume import Sizes, contracted_volume, megatron_volume

Counts: TypeAlias = Mapping[Kind, Fraction]
VOLUMES = {"Megatron": megatron_volume, "contracted": contracted_volume}
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}


def formula(setting: Setting, way: Way, job: Job, num_ranks: int) -> tuple[Counts, Counts]:
    """Elements that a rank sends by kind, forward and backward; of one token where it generates."""
    if not way.is_cut:
        return {}, {}
    is_training = job != "generation"
    tokens = setting.batch * setting.length if is_training else 1
    sizes = Sizes(
        tokens, setting.width, HEADS, HEADS, setting.head_dim, setting.hidden, setting.vocabulary,
        setting.layers,
    )  # fmt: skip
    volume = VOLUMES[way.name](sizes, num_ranks, logits="sharded" if is_training else "whole")
    forward, backward = volume.by_kind("forward"), volume.by_kind("backward")
    if not is_training:
        return forward, {}
    if job == "LoRA step":
        share = sent_fraction("all_reduce", num_ranks)
        more, less = adapters(setting, way)
        forward["all_reduce"] += share * more
        backward["all_reduce"] += share * less
    return forward, backward


def adapters(setting: Setting, way: Way) -> tuple[int, int]:
    """Elements that are all-reduced more than in a full step, forward and backward.

    A is cut with its layer's input and B with its output, so r numbers of each token travel, forward where A
    is cut and backward where B is. Nothing learns before the first adapter: nothing is sent back to there.
    """
    tokens = setting.batch * setting.length
    targets = set(setting.targets)
    thin = setting.layers * tokens * setting.lora_rank
    into, out = len(targets & (ATTENTION | MLP)), len(targets - ATTENTION - MLP)
    before_mlp = bool(targets & (ATTENTION | {"o_proj"}))
    if way.name == "Megatron":
        unsent = 1 + (not before_mlp)  # inputs of the first blocks
        return thin * out, thin * into - tokens * setting.width * unsent
    unsent = tokens * (1 + (not before_mlp))  # their norms
    if not targets & ATTENTION:
        unsent += tokens * HEADS * setting.head_dim  # the input of o
    if not (before_mlp or targets & MLP):
        unsent += tokens * setting.hidden  # the input of down
    return thin * into, thin * out - unsent
