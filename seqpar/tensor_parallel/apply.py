"""`apply_policy`: a model's weights are cut in place, after every rank has agreed to all of it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seqpar.comm import Group, agreed
from seqpar.tensor_parallel.cut import Cut, CutRecord, ModuleKind
from seqpar.tensor_parallel.policy import Policy, Rule
from seqpar.tensor_parallel.saving import guard_saving
from seqpar.tensor_parallel.vocabulary import vocabulary_range

if TYPE_CHECKING:
    from collections.abc import Mapping

_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_ADAPTER = re.compile(r"(?:\.base_layer|\.lora_[AB]\.\w+)$")


def apply_policy(model: nn.Module, policy: Policy, mesh: Any) -> None:
    """Cuts the weights of `model` over the ranks of `mesh`, in place. All its ranks must call.

    Weights become DTensors, of which each rank keeps its part; between modules tensors stay plain. The
    model must be the same on all ranks, and along tp so must what it is called with. Forward
    and backward of every block then communicate; gradients are complete, on each rank for its part.

    Attention is replaced and `SequenceParallel` is set up before: they look at the model by running it. The
    ranks that have other rows of the sequence are then those of `seqpar.sum_gradients`.

    Args:
        model: with its weights, whole on every rank.
        policy: such as `megatron(model)`.
        mesh: a DeviceMesh of one axis; or of two, one of them named "tp": by the other one torch's
            fully_shard spreads the weights too. Its ranks have other rows of the batch, and gradients are
            averaged over it, for `seqpar.mean_loss(..., gradients="mean")`. Dropout must draw alike along tp
            only.

    Raises:
        ValueError: the rules do not fit the weights, heads or sizes do not divide by the ranks, or weights
            that are tied would be cut differently; the model has a policy already. Nothing has been changed.
        NotImplementedError: a module of this kind cannot be cut as its rule says.
        DesyncError: ranks have different models or policies, or another rank raised.
        TypeError: mesh is no DeviceMesh, or policy no Policy but, say, `megatron` itself.
        RuntimeError: torch.distributed is not initialised.
    """
    from seqpar.tensor_parallel.styles import place, shard_weights  # which import all of DTensor

    if not hasattr(mesh, "mesh_dim_names"):
        raise TypeError(f"a policy is applied to a DeviceMesh, got {type(mesh)}")
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 2 or (mesh.ndim == 2 and "tp" not in names):
        raise ValueError(
            f"a policy is applied to a mesh of one axis, or of two of which one is named tp, got {mesh}"
        )
    tp_first = sorted(names, key=lambda name: name != "tp")
    axes = [mesh] if mesh.ndim == 1 else [mesh[name] for name in tp_first]
    group, *others = map(Group.of, axes)
    with (
        agreed(group, *others, operation="apply_policy") as claim,
        agreed(group, operation="apply_policy: dropout") as over_tp,
    ):
        if not isinstance(policy, Policy):
            given = getattr(policy, "__name__", policy)
            raise TypeError(
                f"a model is cut by a Policy, such as megatron(model), got {given} of type "
                f"{type(policy).__name__}; call it with the model if it makes one"
            )
        claim["policy"] = policy
        rules = policy.assign(model)
        claim["weights"] = {path: _digest(model.get_parameter(path)) for path in rules}
        cuts = _cuts(model, policy, rules, group.size)
        _check_tied(model, cuts)
        if any(map(_drops, model.modules())):
            over_tp["seed of dropout"] = torch.initial_seed()
    shared = [path for path in _shared_inputs(cuts) if _reads_alone(model, path, cuts)]
    for path, rule in rules.items():
        module = path.rpartition(".")[0]
        if rule.split == "replicate" and _above(module) in shared and _is_linear(model, module):
            cuts[module] = Cut("linear", None)
    heads = _heads_here(model, rules, group.size)
    place(model, cuts, shared, axes[0])
    for path, number in heads.items():  # for dropout, which counts heads as in the whole layer
        # docs/design.md: a record of a user's module is a hook on it
        record = CutRecord(first_head=group.rank * number)
        model.get_submodule(path).register_forward_hook(record)
    for path, cut in cuts.items():
        if cut.halves:
            model.get_submodule(path).register_forward_hook(CutRecord(num_dealt=group.size))
    if len(axes) > 1:
        shard_weights(model, axes[1])
    guard_saving(model)


def _digest(x: Tensor) -> tuple[object, ...]:
    """What is compared of a weight: shape, type and its sum."""
    if hasattr(x, "full_tensor"):
        raise ValueError(f"a weight is sharded already, got {x.placements}; apply one policy, once")  # type: ignore[attr-defined]
    total = None if x.is_meta else float(x.detach().sum(dtype=torch.float64))
    return tuple(x.shape), x.dtype, x.requires_grad, total


def _cuts(model: nn.Module, policy: Policy, rules: Mapping[str, Rule], size: int) -> dict[str, Cut]:
    cuts: dict[str, Cut] = {}
    for path, rule in rules.items():
        module = path.rpartition(".")[0]
        if rule.split == "fused heads":
            shape = tuple(model.get_parameter(path).shape)
            raise ValueError(
                f"{path} {shape} belongs to an attention whose q, k and v are one weight: rows of it are no "
                f"rank's heads, for any of {size} ranks; replace the attention first with "
                "seqpar.integrations.transformers.replace_attention"
            )
        if rule.split != "replicate" and module not in cuts:
            cuts[module] = _cut(model, module, policy, rule, size)
    cut_as: dict[nn.Module, Cut] = {}
    for path, cut in cuts.items():
        if cut_as.setdefault(model.get_submodule(path), cut) != cut:
            raise ValueError(
                f"a module under several names must be cut the same way, got {cut} for {path}"
            )
    return cuts


def _heads_here(model: nn.Module, rules: Mapping[str, Rule], size: int) -> dict[str, int]:
    """Counts the query heads that each rank has of an attention module whose heads are cut."""
    heads: dict[str, int] = defaultdict(int)
    for path, rule in rules.items():
        if rule.unit is not None and rule.split == "output":
            attention = _above(path.rpartition(".")[0])
            unit: Any = getattr(model.get_submodule(attention), rule.unit)
            here = len(model.get_parameter(path)) // unit // size
            heads[attention] = max(heads[attention], here)  # k and v have no more of them
    return heads


def _cut(model: nn.Module, path: str, policy: Policy, rule: Rule, size: int) -> Cut:
    """How a rule cuts a module."""
    module = model.get_submodule(path)
    (reads, writes), split, kind = rule.forms, rule.split, _kind(module)
    by_kind: dict[tuple[ModuleKind | None, str], int] = {
        ("linear", "output"): 0,
        ("linear", "paired output"): 0,
        ("linear", "vocabulary"): 0,
        ("linear", "input"): 1,
        ("transposed linear", "output"): 1,
        ("transposed linear", "input"): 0,
        ("embedding", "vocabulary"): 0,
        ("embedding", "width"): 1,
        ("norm", "width"): 0,
    }
    if (kind, split) == ("norm", "each head"):
        return Cut("norm", None, per_head=True)
    if kind is None or (kind, split) not in by_kind:
        raise NotImplementedError(
            f"{path} is a {type(module).__name__}, which policy {policy.name} cannot cut by {split!r} "
            f"(rule {rule.pattern!r}); take 'replicate'"
        )
    dim = by_kind[kind, split]
    _check_size(model, path, rule, model.get_parameter(f"{path}.weight").shape[dim], size)
    return Cut(kind, dim, reads, writes, halves=split == "paired output")


def _kind(module: nn.Module) -> ModuleKind | None:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "transposed linear"
    names = [name for name, _ in module.named_parameters()]
    return "norm" if names == ["weight"] else None


def _check_size(model: nn.Module, path: str, rule: Rule, length: int, size: int) -> None:
    if rule.split == "vocabulary":
        vocabulary_range(length, 0, size)
        return
    unit: Any = 2 if rule.split == "paired output" else 1
    if rule.unit is not None:
        unit = getattr(model.get_submodule(_above(path)), rule.unit, None)
        if not isinstance(unit, int):
            raise ValueError(
                f"{_above(path)} must have the attribute {rule.unit}, by which rule {rule.pattern!r} "
                "counts rows"
            )
    if length % (unit * size):
        what = f"{length // unit} heads of {unit}" if rule.unit else f"{length} features"
        help_ = (
            "replace the attention with seqpar.integrations.transformers.replace_attention, which replicates "
            "heads"
            if rule.unit
            else f"take a number of ranks that divides {length // unit}"
        )
        raise ValueError(
            f"{path} has {what} by {rule.split}, which {size} ranks cannot share equally; {help_}"
        )


def _check_tied(model: nn.Module, cuts: Mapping[str, Cut]) -> None:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for same in names.values():
        dims = {
            name: cut.dim if (cut := cuts.get(name.rpartition(".")[0])) else None for name in same
        }
        if len(set(dims.values())) > 1:
            raise ValueError(
                "one weight under several names must be cut the same way, got dimensions "
                + ", ".join(f"{dim} for {name}" for name, dim in dims.items())
            )


def _shared_inputs(cuts: Mapping[str, Cut]) -> list[str]:
    """Modules of which several children read the same whole input, each by its own output features."""
    readers = Counter(
        _above(path)
        for path, cut in cuts.items()
        if cut.kind == "linear" and cut.dim == 0 and cut.reads == "whole" and ".lora_B." not in path
    )
    return [path for path, count in readers.items() if count > 1]


def _reads_alone(model: nn.Module, path: str, cuts: Mapping[str, Cut]) -> bool:
    """Whether only the linear layers of a module meet its input: a plain weight would not take a DTensor."""
    names = {name.rpartition(".")[0] for name, _ in model.get_submodule(path).named_parameters()}
    inside = [f"{path}.{name}" for name in names]
    return path != "" and all(
        _above(p) == path and (_is_linear(model, p) or (p in cuts and cuts[p].per_head))
        for p in inside
    )


def _drops(module: nn.Module) -> bool:
    """Whether a module may draw: those that call dropout as a function hold its probability as a number."""
    chances = [x for name, x in vars(module).items() if "drop" in name and isinstance(x, float)]
    return any(p > 0 for p in chances) or (isinstance(module, _DROPOUTS) and module.p > 0)


def _above(path: str) -> str:
    """The module that holds a layer; an adapter's parts belong to the layer."""
    return _ADAPTER.sub("", path).rpartition(".")[0]


def _is_linear(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), nn.Linear)
