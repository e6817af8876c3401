"""What this project uses of torch that torch does not document; no other module names such a part.

Every use lists the parts that it needs. Where torch lacks one, that use is refused in a sentence when it is
asked for; `import seqpar` never fails for it. What every torch has had for years is only listed, so that the
tests look for it: VERSIONS, VIEWS, HOOKS, BUFFERS and RELOADING.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

TESTED = "2.11 to 2.15"

CPU_FLASH = "torch's flash attention on CPU"
CUDA_FLASH = "torch's flash attention on CUDA"
CUDNN = "torch's cuDNN attention"
COMPILE = "attention in compiled code"
KEEP_COMPILED = "keep_attention in compiled code"
PLAIN_VIEW = "a norm over a sharded width"
COLLECTIVES = "counting the collectives of others"
ALLOCATIONS = "measuring what an op allocates"
DRY_RUNS = "a dry run"
VERSIONS = "keeping what attention gave"
VIEWS = "telling parameters from what is computed"
HOOKS = "looking at the hooks of a module"
BUFFERS = "telling which buffers are saved"
RELOADING = "defining an op anew"
LOOKING = "telling whether anybody looks at ops"
WATCHING = "naming a rank that is waited for in vain"

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# By use, the parts below `torch`. All of them are in every release from 2.11 to 2.15.
PARTS: dict[str, tuple[str, ...]] = {
    CPU_FLASH: (
        "ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    CUDA_FLASH: (
        "ops.aten._flash_attention_forward.default",
        "ops.aten._flash_attention_backward.default",
    ),
    CUDNN: (
        "ops.aten._scaled_dot_product_cudnn_attention.default",
        "ops.aten._scaled_dot_product_cudnn_attention_backward.default",
    ),
    COMPILE: (
        "_library.effects.EffectType.ORDERED",
        "library._register_effectful_op",
        "_C._dispatch_tls_local_include_set",
        "_C._dispatch_tls_local_exclude_set",
        "_C._ForceDispatchKeyGuard",
        "_C.DispatchKey",
    ),
    KEEP_COMPILED: ("_C._get_dispatch_mode", "_C._TorchDispatchModeKey.PROXY"),
    PLAIN_VIEW: ("_C.DisableTorchFunctionSubclass",),
    COLLECTIVES: (
        "utils._python_dispatch.TorchDispatchMode",
        "distributed.distributed_c10d._resolve_process_group",
    ),
    ALLOCATIONS: ("_C._profiler._EventType.Allocation",),
    DRY_RUNS: ("utils._python_dispatch.TorchDispatchMode",),
    VERSIONS: ("Tensor._version",),
    VIEWS: ("Tensor._base",),
    HOOKS: tuple(f"nn.Module.{name}" for name in _HOOKS),
    BUFFERS: ("nn.Module._non_persistent_buffers_set",),
    RELOADING: ("library.Library._destroy", "_disable_dynamo"),
    LOOKING: (
        "_C._len_torch_dispatch_stack",
        "_C._len_torch_function_stack",
        "_ops._len_torch_dispatch_stack_pre_dispatch",
        "_C._functorch.peek_interpreter_stack",
        "_C._get_tracing_state",
    ),
    WATCHING: ("distributed.distributed_c10d._get_default_store", "distributed.Store.clone"),
}


@cache  # as it is when it is first asked: an op that compilers may move then stays so
def missing(use: str) -> str | None:
    """What a use lacks in this torch, as a sentence, or `None`."""
    absent = ", ".join(f"torch.{path}" for path in PARTS[use] if _found(path) is None)
    if not absent:
        return None
    return f"{use} needs {absent}, which torch {torch.__version__} does not have; tested are torch {TESTED}"


@cache
def parts(use: str) -> tuple[Any, ...]:
    """The parts of a use, in their order.

    Raises:
        NotImplementedError: this torch lacks one.
    """
    reason = missing(use)
    if reason is not None:
        raise NotImplementedError(reason)
    return tuple(map(_found, PARTS[use]))


def _found(path: str) -> Any:
    found: Any = torch
    for name in path.split("."):
        if found is nn.Module:  # annotated there, and made for each module
            return nn.Module.__annotations__.get(name)
        found = getattr(found, name, None)
    return found


def attention_ops(use: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, backward) of one of torch's attentions; where they are missing, calling them says so."""
    if missing(use) is None:
        forward, backward = parts(use)
        return forward, backward

    def absent(*_: Any, **__: Any) -> Any:
        parts(use)  # raises

    return absent, absent


def library_of(op: str) -> torch.library.Library:
    """A library to define one op of the namespace seqpar in.

    That of an earlier import ends: modules are imported anew in notebooks and in the tests of others.
    """
    kept = vars(torch.ops.seqpar).setdefault("libraries", {})
    if op in kept:
        kept.pop(op)._destroy()
    kept[op] = torch.library.Library("seqpar", "FRAGMENT")
    return kept[op]


def without_dynamo(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, into which Dynamo does not look. Calling it imports Dynamo."""
    hide = _found("_disable_dynamo")
    return run if hide is None else hide(run)


def keep_order(op: str, library: torch.library.Library) -> None:
    """Has compilers neither move nor drop calls of an op, if this torch can; else compiling is refused."""
    if missing(COMPILE) is None:
        ordered, register, *_ = parts(COMPILE)
        register(op, ordered, lib=library)


@contextmanager
def differentiating() -> Iterator[None]:
    """Autograd as outside of an op: torch turns it off inside."""
    if missing(COMPILE) is not None:  # then there are no ops to be inside of
        with torch.enable_grad():
            yield
        return
    _, _, get_included, get_excluded, guard, keys = parts(COMPILE)
    excluded = get_excluded()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(keys, name))
    with guard(get_included(), excluded), torch.enable_grad():
        yield


def is_traced_here() -> bool:
    """Whether a compiler traces this thread. `torch.compiler.is_compiling` is of the whole process."""
    get_mode, proxy = parts(KEEP_COMPILED)
    return get_mode(proxy) is not None


def nobody_looks(tensors: Iterable[Tensor | None]) -> bool:
    """Whether no compiler, mode, transform or subclass of Tensor is there to see an op of these tensors."""
    if torch.compiler.is_compiling() or missing(LOOKING) is not None:
        return False
    *modes, transforms, jit = parts(LOOKING)
    kinds = (Tensor, nn.Parameter)
    return (
        not any(count() for count in modes)
        and transforms() is None
        and jit() is None
        and all(x is None or (type(x) in kinds and x.device.type != "meta") for x in tensors)
    )


def without_subclass() -> AbstractContextManager[object]:
    """In which a subclass of Tensor is not asked what a function of it means."""
    (disable,) = parts(PLAIN_VIEW)
    return disable()


def process_group_named(name: str) -> Any:
    """The process group that an operator of torch calls by name."""
    return parts(COLLECTIVES)[1](name)


def own_store() -> Any:
    """A connection of one's own to the store that process groups were made with."""
    return parts(WATCHING)[0]().clone()


def argument_names(op: Any) -> list[str]:
    """The names of an operator's arguments, in order."""
    return [argument.name for argument in op._schema.arguments]


def allocated(profiled: torch.profiler.profile) -> list[tuple[str, int]]:
    """(the outermost `record_function` around it, bytes more or less) of what CPU tensors took, in order."""
    (allocation,) = parts(ALLOCATIONS)
    kineto: Any = profiled.profiler.kineto_results  # type: ignore[union-attr]

    def changes(events: Iterable[Any], phase: str) -> Iterator[tuple[int, int, str]]:
        for event in events:
            if event.tag == allocation:
                yield event.start_time_ns, event.extra_fields.alloc_size, phase
            yield from changes(event.children, phase or event.name)

    found = sorted(changes(kineto.experimental_event_tree(), ""))
    return [(phase, size) for _, size, phase in found]


DispatchMode: Any = _found("utils._python_dispatch.TorchDispatchMode") or object


def version(x: Tensor) -> int:
    """How often a tensor was written to; 0 in inference mode, where nobody counts."""
    return 0 if x.is_inference() else x._version


def viewed(x: Tensor) -> Tensor:
    """The tensor that this one is a view of, or itself."""
    return x if x._base is None else x._base


def forward_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The hooks before and after a module's forward, by number; taking one out removes it."""
    return module._forward_pre_hooks, module._forward_hooks


def is_saved(module: nn.Module, buffer: str) -> bool:
    """Whether a buffer of a module is part of its state."""
    return buffer not in module._non_persistent_buffers_set


def hooks_on(module: nn.Module) -> list[str]:
    """The kinds of hooks that are on a module."""
    return [name.removeprefix("_") for name in _HOOKS if getattr(module, name)]
