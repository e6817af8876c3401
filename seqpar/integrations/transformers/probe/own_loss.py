"""Which label a model's own loss compares each row with, found by computing it both ways."""

from __future__ import annotations

import inspect
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
_DRAWN = (1, 0, 0, 1, IGNORE, 1, 0, 1, 1, 0, 0)  # two classes are enough for any head


def trial_labels(inner: PreTrainedModel, num_rows: int) -> dict[str, Tensor]:
    """Labels to run a model with, as an argument, if it takes any."""
    if "labels" not in inspect.signature(inner.forward).parameters:
        return {}
    return {"labels": torch.tensor([_DRAWN[:num_rows]], device=inner.device)}


def labels_of(inner: PreTrainedModel, output: Any, given: dict[str, Tensor]) -> Labels | None:
    """Which label its loss compares a row with: the next one, its own, or `None` where it is another loss.

    Args:
        output: of a run with the labels `given`, if any: without, the name of the class has to do.
    """
    named = BY_NAME.get(inner.loss_type)
    loss, logits = output.get("loss"), output.get("logits")
    if not given or loss is None:
        return named
    if logits is None or logits.ndim != 3 or loss.numel() != 1 or logits.shape[-1] < 2:
        return None
    (labels,) = given["labels"]
    rows = logits[0].to(accumulation_dtype(logits.dtype))
    candidates: dict[Labels, Tensor] = {
        "next": F.cross_entropy(rows[:-1], labels[1:], ignore_index=IGNORE),
        "own": F.cross_entropy(rows, labels, ignore_index=IGNORE),
    }
    # Some compute it in the type of the model, some in float32.
    step = max(torch.finfo(loss.dtype).eps, torch.finfo(torch.float32).eps)
    found = [
        name
        for name, ours in candidates.items()
        if abs(float(loss) - float(ours)) <= 16 * step * max(1.0, abs(float(ours)))
    ]
    return found[0] if len(found) == 1 else named if named in found else None
