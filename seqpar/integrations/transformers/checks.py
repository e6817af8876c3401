"""What is found out about a model before it is sharded, by its config and by running it on a few tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar.comm import Group
from seqpar.integrations.transformers.call import Call
from seqpar.integrations.transformers.registration import NAME
from seqpar.integrations.transformers.rows import (
    NUM_ROWS,
    Trace,
    culprit,
    run_traced,
    same_rows,
    two_runs,
)
from seqpar.layout import contiguous
from seqpar.strategies import Plan


@dataclass(frozen=True)
class Findings:
    """What the runs found.

    Args:
        causal: whether all layers that attend are causal.
        numbered: whether each has a layer_idx of its own.
    """

    causal: bool
    numbered: bool


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, whatever wraps it.

    Raises:
        TypeError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"SequenceParallel takes a transformers model, got {type(model).__name__}")


def check_config(model: nn.Module, inner: PreTrainedModel) -> None:
    """Refuses what a model's config and state say that sharding cannot honour.

    Raises:
        NotImplementedError: it has an encoder and a decoder, several modalities, a prefix of learned
            tokens, a loss over routers, or returns attention weights.
        ValueError: its weights are not there yet.
    """
    config, name = inner.config, type(inner).__name__
    parts = [key for key in config.sub_configs if getattr(config, key, None) is not None]
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise NotImplementedError(
            f"{name} has cross attention; only one stack of self attention is sharded"
        )
    if parts:
        raise NotImplementedError(
            f"{name} is made of {parts}; take the text model out of it, such as Gemma3ForCausalLM"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise NotImplementedError(
            "a prefix or prompt that is learned makes the sequence longer than its layout; take an adapter "
            "of weights, such as LoRA"
        )
    if getattr(config, "output_router_logits", False):
        raise NotImplementedError(
            f"{name} adds a loss over its routers (output_router_logits), which is no mean over tokens; set "
            "config.output_router_logits = False"
        )
    if config.output_attentions:
        raise NotImplementedError(
            f"{name} returns attention weights; set config.output_attentions = False"
        )
    if any(p.device.type == "meta" for p in inner.parameters()):
        raise ValueError(
            f"{name} is looked at by running it: set it up when its weights are loaded"
        )


def try_out(inner: PreTrainedModel) -> Findings:
    """Runs the model on a few tokens, here alone, and says what was found. Switches its attention.

    The same rows must come out of the model as it was (with eager attention) and as it will be; and rows
    must not depend on each other but through the attention function.

    Raises:
        NotImplementedError: they do, or it returns what is not one row per token, or its attention does
            more than what reaches the attention function.
    """
    num_rows = min(NUM_ROWS, getattr(inner.config, "max_position_embeddings", None) or NUM_ROWS)
    runs = two_runs(num_rows, inner.config.vocab_size)
    tokens = runs.tokens.to(inner.device)
    in_order = torch.arange(num_rows, device=inner.device)[None]
    with _evaluating(inner):
        inner.set_attn_implementation("eager")
        eager = inner(**common_arguments(inner, input_ids=tokens), return_dict=True)
        inner.set_attn_implementation(NAME)
        if inner.config._attn_implementation != NAME:
            raise NotImplementedError(_own_attention(inner))
        arguments = row_arguments(inner, tokens, in_order)
        one = run_traced(inner, arguments | {"return_dict": True}, num_rows)
        others = row_arguments(inner, *(x.to(inner.device) for x in (runs.others, runs.positions)))
        two = run_traced(inner, others | {"return_dict": True}, num_rows)
        at_fault = culprit(one, two, runs)
        if at_fault is not None:
            raise NotImplementedError(
                f"{at_fault} lets rows depend on each other outside of the attention function, which a shard "
                "would cut in silence"
            )
        if not one.layers:
            raise NotImplementedError(
                f"no layer of {type(inner).__name__} calls the attention function"
            )
        _check_output(inner, one.output, num_rows)
        alone = Call(Plan(Group.alone(), contiguous(num_rows, 1)))
        ours = inner(**arguments, seqpar=alone, return_dict=True)
        _check_equal(inner, eager, ours)
    return _findings(one)


def common_arguments(inner: PreTrainedModel, **arguments: Any) -> dict[str, Any]:
    """Arguments for every call: no cache is kept, where the model could."""
    takes_cache = "use_cache" in inspect.signature(inner.forward).parameters
    return arguments | ({"use_cache": False} if takes_cache else {})


def row_arguments(
    inner: PreTrainedModel, input_ids: Tensor, position_ids: Tensor
) -> dict[str, Any]:
    """Arguments as `SequenceParallel.shard` gives them.

    The mask is always there: without one, models take a jump of position_ids for a new document.
    """
    mask = torch.ones_like(input_ids)
    return common_arguments(
        inner, input_ids=input_ids, position_ids=position_ids, attention_mask=mask
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _own_attention(inner: PreTrainedModel) -> str:
    """What to say of a model that transformers itself does not switch."""
    named = [
        f"{name} ({type(m).__name__})"
        for name, m in inner.named_modules()
        if "Attention" in type(m).__name__
    ]
    return (
        f"{named[0] if named else type(inner).__name__} computes attention by itself and not through the "
        "attention function of transformers, so it cannot be switched"
    )


def _check_output(inner: PreTrainedModel, output: Any, num_rows: int) -> None:
    for name, value in output.items():
        if isinstance(value, Tensor) and tuple(value.shape[:2]) != (1, num_rows):
            raise NotImplementedError(
                f"{type(inner).__name__} returns {name} {tuple(value.shape)} for {num_rows} tokens, which is "
                "not one row per token; take the model without its pooling or head"
            )


def _check_equal(inner: PreTrainedModel, eager: Any, ours: Any) -> None:
    for name, value in eager.items():
        if isinstance(value, Tensor) and not same_rows(value[0], ours[name][0]):
            worst = float((value - ours[name]).abs().max())
            raise NotImplementedError(
                f"{type(inner).__name__} returns other {name} than with eager attention, off by {worst:.2g}: "
                "layers do something that does not reach the attention function, or it numbers "
                "positions in a way of its own"
            )


def _findings(trace: Trace) -> Findings:
    numbers = [getattr(layer.module, "layer_idx", None) for layer, _ in trace.layers]
    return Findings(
        causal=all(terms.mask.causal for _, terms in trace.layers),
        numbered=None not in numbers and len(set(numbers)) == len(numbers),
    )
