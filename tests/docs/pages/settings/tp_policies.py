"""What the blocks of docs/tp-policies.md need."""

from seqpar.tensor_parallel import megatron
from seqpar.testing.models.tiny import FAMILIES
from seqpar.testing.models.under_policy import tiny


def policy():
    model = FAMILIES["llama"].make()
    before = sum(p.numel() for p in model.parameters())
    yield {"model": model, "tp": 2}
    assert sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local")) < before


def your_own():
    """The policy of the page is Megatron's."""
    names = {}
    yield names
    model = tiny("gemma")
    ours = names["policy"].assign(model)
    for path, rule in megatron(model).assign(model).items():
        found = ours[path]
        assert (found.split, found.forms, found.unit) == (rule.split, rule.forms, rule.unit)
