"""What is found out about a model before it is sharded, by its config and by running it on a few tokens."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqpar.comm import Group
from seqpar.integrations.transformers.call import Call
from seqpar.integrations.transformers.documents import RowGroup
from seqpar.integrations.transformers.patterns import as_bytes
from seqpar.integrations.transformers.registration import NAME, MissingPlanError
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

PACKED_AT = 3  # where a second document starts, and up to where padding is, when a model is tried
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Findings:
    """What the runs found.

    Args:
        causal: whether all layers that attend are causal.
        first_position: what the model counts positions from: 0, or as RoBERTa does, 1 after its padding.
        counts_seen: whether positions that it is not given are counted over what attention_mask shows.
        packs: whether positions that start anew are documents to it, on one device.
        numbers: of the modules that attend, in the order in which they do; those that attend once in a call.
    """

    causal: bool
    first_position: int
    counts_seen: bool
    packs: bool
    numbers: Mapping[nn.Module, int] = field(repr=False)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, whatever wraps it.

    Raises:
        TypeError: there is none.
        ValueError: there are several.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        raise TypeError(f"SequenceParallel takes a transformers model, got {type(model).__name__}")
    own = set(inner.modules())
    others = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m not in own]
    if others:
        raise ValueError(
            f"{type(model).__name__} holds {type(inner).__name__} and {type(others[0]).__name__}, of which "
            "only the first would attend over ranks; set each up by itself"
        )
    return inner


def check_config(model: nn.Module, inner: PreTrainedModel) -> None:
    """Refuses what a model's config and state say that sharding cannot honour.

    Raises:
        NotImplementedError: it has an encoder and a decoder, several modalities, a prefix of learned
            tokens, an adapter that looks for its tokens, layers that are skipped at random, a loss over
            routers, or returns attention weights.
        ValueError: its weights are not there yet.
    """
    config, name = inner.config, type(inner).__name__
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise NotImplementedError(
            f"{name} has cross attention; only one stack of self attention is sharded"
        )
    if config.get_text_config() is not config:
        raise NotImplementedError(
            f"{name} is made of {sorted(config.sub_configs)}; take the text model out of it, such as "
            "Gemma3ForCausalLM"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise NotImplementedError(
            "a prefix or prompt that is learned makes the sequence longer than its layout; take an adapter "
            "of weights, such as LoRA"
        )
    adapters = getattr(model, "peft_config", None) or {}
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters.values()):
        raise NotImplementedError(
            "an activated adapter (alora_invocation_tokens) looks for its tokens in what a rank holds; take "
            "plain LoRA"
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
    skips = [n for n, m in inner.named_modules() if getattr(m, "layerdrop", 0)]
    if skips:
        raise NotImplementedError(
            f"{skips[0] or name} skips layers at random, each rank others; load it with layerdrop=0"
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
    runs = two_runs(num_rows, inner.config.vocab_size, _special_tokens(inner))
    tokens = runs.tokens.to(inner.device)
    in_order = torch.arange(num_rows, device=inner.device)[None]
    with _evaluating(inner):
        inner.set_attn_implementation(NAME)
        if inner.config._attn_implementation != NAME:
            raise NotImplementedError(_own_attention(inner))
        if not _takes_positions(inner):
            raise NotImplementedError(f"{type(inner).__name__} takes no position_ids")
        inner.set_attn_implementation("eager")
        eager = inner(**common_arguments(inner, input_ids=tokens), return_dict=True)
        first = _first_position(inner, tokens, in_order, eager)
        packed = _packed(inner, tokens, first)
        inner.set_attn_implementation(NAME)
        arguments = row_arguments(inner, tokens, in_order + first)
        one = _run_traced(inner, arguments, num_rows)
        moved = (runs.positions + first).to(inner.device)
        others = row_arguments(inner, runs.others.to(inner.device), moved)
        two = _run_traced(inner, others, num_rows)
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
        _check_layer_types(inner)
        _check_output(inner, one.output, num_rows)
        alone = Call(Plan(Group.alone(), contiguous(num_rows, 1)))
        ours = inner(**arguments, seqpar=alone, return_dict=True)
        _check_equal(inner, eager, ours)
        apart = replace(alone, groups=(RowGroup(None, (0, PACKED_AT, num_rows)),))
        counts_seen = _counts_seen(inner, arguments, apart)
        of_documents = inner(**arguments | packed.arguments, seqpar=apart, return_dict=True)
        packs = _difference(packed.eager, of_documents, slice(PACKED_AT, None)) is None
    return _findings(one, first, counts_seen=counts_seen, packs=packs)


def _special_tokens(inner: PreTrainedModel) -> list[int]:
    """Tokens that may change what a model does with others, such as the mask token of ESM."""
    pairs = sorted(inner.config.to_dict().items())
    ids = {x for n, x in pairs if n.endswith("_token_id") and isinstance(x, int)}
    padding = getattr(inner.config, "pad_token_id", None)
    return sorted(i for i in ids if i != padding and 0 <= i < inner.config.vocab_size)


def common_arguments(inner: PreTrainedModel, **arguments: Any) -> dict[str, Any]:
    """Arguments for every call: no cache is kept, where the model could."""
    takes_cache = "use_cache" in inspect.signature(inner.forward).parameters
    return arguments | ({"use_cache": False} if takes_cache else {})


def _takes_positions(inner: PreTrainedModel) -> bool:
    parameters = inspect.signature(inner.forward).parameters
    return "position_ids" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())


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


def _run_traced(inner: PreTrainedModel, arguments: dict[str, Any], num_rows: int) -> Trace:
    """A traced run; what fails in it is what the model does with a mask that is none, or with the plan."""
    try:
        return run_traced(inner, arguments | {"return_dict": True}, num_rows)
    except MissingPlanError as error:
        raise NotImplementedError(
            f"{type(inner).__name__} does not pass its keyword arguments on to its attention, so no plan can "
            "reach it"
        ) from error
    except (NotImplementedError, ValueError):
        raise
    except Exception as error:
        raise NotImplementedError(
            f"{type(inner).__name__} looks into its masks, which a shard does not have: {error}"
        ) from error


def _check_layer_types(inner: PreTrainedModel) -> None:
    """Refuses layers that attend to a choice of what their mask shows, which few tokens may not reveal."""
    for number, kind in enumerate(getattr(inner.config, "layer_types", None) or ()):
        if kind not in LAYER_TYPES:
            raise NotImplementedError(
                f"layer {number} of {type(inner).__name__} is {kind!r}; known are {sorted(LAYER_TYPES)}"
            )


def _check_output(inner: PreTrainedModel, output: Any, num_rows: int) -> None:
    for name, value in output.items():
        if isinstance(value, Tensor) and tuple(value.shape[:2]) != (1, num_rows):
            raise NotImplementedError(
                f"{type(inner).__name__} returns {name} {tuple(value.shape)} for {num_rows} tokens, which is "
                "not one row per token; take the model without its pooling or head"
            )


def _check_equal(inner: PreTrainedModel, eager: Any, ours: Any) -> None:
    found = _difference(eager, ours)
    if found is not None:
        raise NotImplementedError(
            f"{type(inner).__name__} returns other {found[0]} than with eager attention, off by "
            f"{found[1]:.2g}: layers do something that does not reach the attention function, or it numbers "
            "positions in a way of its own"
        )


def _first_position(inner: PreTrainedModel, tokens: Tensor, in_order: Tensor, expected: Any) -> int:
    """What the model counts positions from when it is given none."""
    after_padding = (getattr(inner.config, "pad_token_id", None) or 0) + 1
    given = common_arguments(inner, input_ids=tokens, position_ids=in_order, return_dict=True)
    if _difference(expected, inner(**given)) is not None:
        given["position_ids"] = in_order + after_padding
        if _difference(expected, inner(**given)) is None:
            return after_padding
    return 0


def _counts_seen(inner: PreTrainedModel, arguments: dict[str, Any], apart: Call) -> bool:
    """Whether a model counts its positions from the first token that attention_mask shows."""
    mask = arguments["attention_mask"].clone()
    mask[:, :PACKED_AT] = 0
    call = replace(apart, hidden=as_bytes(mask))
    given = arguments | {"attention_mask": mask, "seqpar": call, "return_dict": True}
    own = inner(**{name: x for name, x in given.items() if name != "position_ids"})
    return _difference(own, inner(**given), slice(PACKED_AT, None)) is not None


@dataclass(frozen=True)
class _Packed:
    """Arguments of two documents in one row, and what comes out of eager attention."""

    arguments: dict[str, Any]
    eager: Any


def _packed(inner: PreTrainedModel, tokens: Tensor, first: int) -> _Packed:
    starts = (0, PACKED_AT, tokens.shape[1])
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(starts)])[None].to(
        tokens.device
    )
    given = {"position_ids": positions + first}
    eager = inner(**common_arguments(inner, input_ids=tokens, **given, return_dict=True))
    return _Packed(given, eager)


def _difference(expected: Any, output: Any, rows: slice = slice(None)) -> tuple[str, float] | None:
    """The first of a model's outputs that is another, and how far it is off."""
    for name, value in expected.items():
        if isinstance(value, Tensor) and not same_rows(value[0, rows], output[name][0, rows]):
            return name, float((value - output[name]).abs().max())
    return None


def _findings(trace: Trace, first_position: int, *, counts_seen: bool, packs: bool) -> Findings:
    calls = Counter(layer.module for layer, _ in trace.layers)
    once = [layer.module for layer, _ in trace.layers if calls[layer.module] == 1]
    return Findings(
        causal=all(terms.mask.causal for _, terms in trace.layers),
        first_position=first_position,
        counts_seen=counts_seen,
        packs=packs,
        numbers={module: number for number, module in enumerate(once)},
    )
