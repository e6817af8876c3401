"""What the blocks of docs/tp-policies.md need."""

import torch
from compare_tp_policies import QUICK
from policies.model import gemma_like

from seqpar.tensor_parallel import megatron
from seqpar.testing.models.tiny import FAMILIES


def policy():
    model = FAMILIES["llama"].make()
    before = sum(p.numel() for p in model.parameters())
    yield {"model": model, "tp": 2}
    assert sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local")) < before


def your_own():
    """The policy of the page is Megatron's."""
    names = {}
    yield names
    model = gemma_like(QUICK, torch.float32)
    ours = names["policy"].assign(model)
    for path, rule in megatron(model).assign(model).items():
        found = ours[path]
        assert (found.split, found.forms, found.unit) == (rule.split, rule.forms, rule.unit)
