"""What a model's config and state say about whether it can be sharded, before it is run."""

from __future__ import annotations

import threading
import weakref

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

# By config: the model that was set up with it last, and on which thread.
_IN_USE = WeakIdKeyDictionary()


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


def text_stack(inner: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that has its text layers: the model itself, unless it is made of several parts.

    Raises:
        NotImplementedError: no part, or more than one, has the config of the text.
    """
    config = inner.config.get_text_config()
    if config is inner.config:
        return inner
    found: list[PreTrainedModel] = []
    for module in inner.modules():
        is_inside = any(module in set(other.modules()) for other in found)
        if isinstance(module, PreTrainedModel) and module.config is config and not is_inside:
            found.append(module)
    if len(found) != 1:
        raise NotImplementedError(
            f"{type(inner).__name__} is made of {sorted(inner.config.sub_configs)}, and "
            f"{len(found)} parts of it have the config of the text; set up its text model by itself"
        )
    return found[0]


def check_own_config(inner: PreTrainedModel) -> None:
    """Refuses a config that the model of another rank shares, where ranks are threads of one process.

    A model reads from its config how it attends, so ranks would switch each other's models.

    Raises:
        ValueError: it is shared.
    """
    me, config = threading.get_ident(), inner.config
    other, thread = _IN_USE.get(config, (lambda: None, me))
    alive = {t.ident for t in threading.enumerate()}
    if other() not in (None, inner) and thread != me and thread in alive:
        raise ValueError(
            f"the {type(inner).__name__} of another rank has the same config object; make each rank's model "
            "from a copy.deepcopy of the config, or of the model"
        )
    _IN_USE[config] = weakref.ref(inner), me


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
    parts = config, config.get_text_config()
    if any(getattr(part, "output_router_logits", False) for part in parts):
        raise NotImplementedError(
            f"{name} adds a loss over its routers (output_router_logits), which is no mean over tokens; set "
            "config.output_router_logits = False"
        )
    if any(part.output_attentions for part in parts):
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
