"""Which label a model's own loss compares each row with, found by computing it both ways."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from seqpar.data import IGNORE, Labels
from seqpar_kernels import accumulation_dtype

# What the name of a class says. It is no evidence: the decoder of Whisper does not shift its labels.
BY_NAME: dict[str | None, Labels] = {
    "ForCausalLM": "next",
    None: "next",  # as transformers does for classes it cannot tell, such as GPT2LMHeadModel
    "ForMaskedLM": "own",
    "ForTokenClassification": "own",
}
_IGNORED = 2  # a row whose label does not count


def own_labels(
    inner: PreTrainedModel, arguments: Mapping[str, Any], output: Mapping[str, Any]
) -> Labels | None:
    """Which label its loss compares a row with: the next one, its own, or `None` where it is another loss.

    It is run once more, with labels. The name of its class has to do where that cannot tell: it takes no
    labels, its logits are sharded by vocabulary, or are all the same. A run that fails is another loss.

    Args:
        arguments: of a run of one sequence.
        output: what it gave, a row for each token.
    """
    named, logits = BY_NAME.get(inner.loss_type), output.get("logits")
    if logits is None or "labels" not in inspect.signature(inner.forward).parameters:
        return named
    if logits.ndim != 3 or logits.shape[-1] < 2:
        return None
    head = inner.get_output_embeddings()
    if logits.shape[-1] != getattr(head, "out_features", logits.shape[-1]):
        return named
    # The class that a row finds least likely: no other label has a loss as high.
    labels = logits[0].argmin(-1)
    labels[_IGNORED : _IGNORED + 1] = IGNORE
    try:
        loss = inner(**arguments, labels=labels[None]).get("loss")
    except Exception:  # whatever it is: labels of this kind are not what it takes
        return None
    if loss is None or loss.numel() != 1:
        return None
    ways: tuple[Labels, ...] = ("next", "own")
    found = [name for name in ways if _is_loss(name, loss, logits[0], labels)]
    return found[0] if len(found) == 1 else named if named in found else None


def _is_loss(name: Labels, loss: Tensor, rows: Tensor, labels: Tensor) -> bool:
    """Whether a loss is the mean cross entropy of these labels; some models compute it in their own type."""
    if name == "next":
        rows, labels = rows[:-1], labels[1:]
    step = max(torch.finfo(loss.dtype).eps, torch.finfo(torch.float32).eps)
    for dtype in {rows.dtype, accumulation_dtype(rows.dtype), torch.float32}:
        ours = float(F.cross_entropy(rows.to(dtype), labels, ignore_index=IGNORE))
        if abs(float(loss) - ours) <= 2 * step * max(1.0, abs(ours)):
            return True
    return False
