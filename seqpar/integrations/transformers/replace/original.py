"""`Original`: an attention module of a model, of a known family and with nothing that is not known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from seqpar.integrations.transformers.replace.families import FAMILIES
from seqpar.integrations.transformers.replace.family import Family
from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.known_models import known_layout
from seqpar_kernels.torch_internals import hooks_on

PREFIX = "transformers.models."
CONV1D = "transformers.pytorch_utils.Conv1D"  # its weight is [in, out]
PROJECTIONS = {
    "torch.nn.modules.linear.Linear", f"{PREFIX}falcon.modeling_falcon.FalconLinear", CONV1D,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Original:
    """An attention module, where it is, and what it is made of.

    Args:
        path: in the model.
        parent: the module that holds it, under the last part of its path.
        qkv: the layout of q, k and v.
        projections: of q, k and v, one or three.
        out: the output projection.
        norms: of q and k, where it has them.
        others: its other children, such as dropouts, by name.
    """

    path: str
    parent: nn.Module = field(repr=False)
    module: nn.Module = field(repr=False)
    family: Family = field(repr=False)
    qkv: FusedQKV
    projections: list[Any] = field(init=False, repr=False)
    out: Any = field(init=False, repr=False)
    norms: tuple[nn.Module | None, nn.Module | None] = field(init=False, repr=False)
    others: dict[str, nn.Module] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        family, children = self.family, dict(self.module.named_children())
        parts = {
            "projections": [children.pop(name) for name in family.qkv],
            "out": children.pop(family.out),
            "norms": tuple(children.pop(name, None) for name in family.norms or ("", "")),
            "others": children,
        }
        for name, part in parts.items():
            object.__setattr__(self, name, part)

    @property
    def width(self) -> int:
        """The width of the rows that it takes."""
        first = self.projections[0]
        return int(first.weight.shape[0 if _class(first) == CONV1D else 1])

    @property
    def out_transposed(self) -> bool:
        """Whether the weight of the output projection is `[in, out]`."""
        return _class(self.out) == CONV1D

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters of its projections."""
        return [p for module in (*self.projections, self.out) for p in module.parameters()]

    @property
    def kept(self) -> dict[str, nn.Parameter]:
        """The parameters that its replacement uses as they are, those of norms, by name."""
        own = {id(p) for p in self.weights}
        return {name: p for name, p in self.module.named_parameters() if id(p) not in own}

    @property
    def learning(self) -> dict[str, bool]:
        """Which parameters of a `ParallelAttention` learn."""
        return {
            f"{part}_{kind}": all(_flags(modules, kind))
            for part, modules in (("qkv", self.projections), ("out", [self.out]))
            for kind in ("weight", "bias")
        }

    def put(self, module: nn.Module) -> None:
        """Puts a module in its place."""
        setattr(self.parent, self.path.rpartition(".")[2], module)

    def check(self) -> None:
        """Refuses what the family is not known to have.

        Raises:
            NotImplementedError: the module, its projections or parameters are of another kind than known, or
                it has hooks, or its config asks for what is not honoured.
            ValueError: it has gradients, which would be lost.
        """
        refused = self.family.refused(self.module)
        if refused is not None:
            raise NotImplementedError(f"{self.path} asks for {refused}, which is not honoured")
        names = (*self.family.qkv, self.family.out)
        for name, kind in zip(names, map(_class, (*self.projections, self.out)), strict=True):
            if kind not in PROJECTIONS:
                raise NotImplementedError(
                    f"{self.path}.{name} is a {kind}; replace attention before it is wrapped or quantised"
                )
        for name, child in self.others.items():
            if next(child.parameters(), None) is not None:
                raise NotImplementedError(
                    f"{self.path}.{name} ({type(child).__name__}) has weights of its own"
                )
        for name, parameter in self.module.named_parameters():
            if type(parameter.data) is not torch.Tensor:
                raise NotImplementedError(
                    f"{self.path}.{name} is a {type(parameter.data).__name__}; replace attention before "
                    "anything shards the model"
                )
            if parameter.grad is not None:
                raise ValueError(
                    f"{self.path}.{name} has a gradient, which would be lost; zero_grad() first"
                )
        kinds = {(p.dtype, p.device) for p in self.weights}
        if len(kinds) > 1:
            raise NotImplementedError(
                f"the projections of {self.path} must be of one type on one device, got {kinds}"
            )
        hooks = [kind for m in self.module.modules() for kind in hooks_on(m)]
        if hooks:
            raise NotImplementedError(f"{self.path} has {hooks[0]}, which would not run any more")
        if any(len(set(_flags(self.projections, kind))) > 1 for kind in ("weight", "bias")):
            raise NotImplementedError(
                f"some of {self.family.qkv} of {self.path} learn and some do not"
            )


def originals_of(model: nn.Module, inner: PreTrainedModel) -> list[Original]:
    """The attention modules of a model, in order, checked.

    Raises:
        NotImplementedError: it has none that is known, or others besides; and as `Original.check`.
        ValueError: the layout of a weight is not that of its config; and as `Original.check`.
    """
    modules = dict(model.named_modules())
    families = {path: _family(m) for path, m in modules.items()}
    found = {path: family for path, family in families.items() if family is not None}
    strange = [
        f"{path} ({type(m).__name__})"
        for path, m in modules.items()
        if type(m).__name__.endswith(("Attention", "Attention2")) and path not in found
    ]
    if not found or strange:
        classes = sorted({name.rpartition(".")[2] for f in FAMILIES for name in f.classes})
        what = strange[0] if strange else type(inner).__name__
        raise NotImplementedError(
            f"the attention of {what} is not known to replace_attention; known are {', '.join(classes)}"
        )
    _check_shared(model, found)
    originals = [
        Original(
            path,
            modules[path.rpartition(".")[0]],
            modules[path],
            family,
            _layout(inner.config, path, modules[path], family),
        )
        for path, family in found.items()
    ]
    for original in originals:
        original.check()
    return originals


def _family(module: nn.Module) -> Family | None:
    """The family of an attention module, if it is one that is known."""
    name = _class(module)
    known = (f for f in FAMILIES if any(name == PREFIX + c for c in f.classes))
    return next((f for f in known if f.when(module)), None)


def _check_shared(model: nn.Module, found: Iterable[str]) -> None:
    """Refuses weights of attention that are weights of something else too: each would be cut by itself."""
    places: dict[nn.Parameter, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(path)
    for paths in places.values():
        if len(paths) > 1 and any(path.startswith(f"{own}.") for path in paths for own in found):
            raise NotImplementedError(
                f"{paths[0]} and {paths[1]} are one weight; shared attention cannot be replaced"
            )


def _flags(projections: list[Any], kind: str) -> list[bool]:
    """Whether the weights of projections learn, or their biases, as far as there are any."""
    parameters = (getattr(projection, kind) for projection in projections)
    return [p.requires_grad for p in parameters if p is not None]


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _layout(config: Any, path: str, module: Any, family: Family) -> FusedQKV:
    """The layout of a module's q, k and v; of separate ones as if they followed on one another."""
    projections: list[Any] = [module.get_submodule(name) for name in family.qkv]
    biases = [p.bias is not None for p in projections]
    if len(projections) == 1:
        layout = known_layout(config, f"{path}.{family.qkv[0]}.weight")
        if layout.bias != biases[0]:
            raise ValueError(
                f"the config says bias={layout.bias} of {path}.{family.qkv[0]}, which has {biases[0]}"
            )
        return layout
    if len(set(biases)) > 1:
        raise NotImplementedError(f"some of {family.qkv} of {path} have a bias and some have none")
    heads, kv = (p.out_features // module.head_dim for p in projections[:2])
    return FusedQKV.contiguous(heads, module.head_dim, kv, bias=biases[0])


def layouts(originals: list[Original]) -> Iterator[tuple[str, object]]:
    """What ranks must have in common, to agree on."""
    for original in originals:
        shapes = {n: tuple(p.shape) for n, p in original.module.named_parameters()}
        yield original.path, (original.qkv, shapes, original.learning)
