"""`define`: an operator of torch in Python, whose first eager call imports no compiler.

`torch.library.custom_op` serves the same ends, but imports torch._dynamo, inductor and sympy when an op is
first called: 894 modules and 149 MB in every process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from seqpar_kernels.derivatives import first_only
from seqpar_kernels.torch_internals import keep_order, library_of, without_dynamo

# What the ops of this namespace do, by their names, for who looks into them.
RUNS: dict[str, Callable[..., Any]] = {}


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    save: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
    sends: bool = False,
) -> None:
    """Defines `torch.ops.seqpar.<name>`, on every device.

    Results may be neither an argument nor one another.

    Args:
        schema: from the opening parenthesis on.
        fake: gives tensors without content like the results.
        save: the `setup_context` of its gradient.
        differentiate: its gradient, of first order only; an op without one refuses to be differentiated.
        sends: whether ranks exchange messages inside, so that compilers must keep the order of calls.
    """
    qualified, library = f"seqpar::{name}", library_of(name)
    RUNS[qualified] = run
    # Messages are not captured: ranks compare each call over the CPU, which a replay would leave out.
    unsafe = (torch.Tag.cudagraph_unsafe,) if sends else ()
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *unsafe))
    library.impl(name, _not_traced(run), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_autograd(
        qualified,
        first_only(differentiate or _refuse(name)),
        setup_context=save,
        lib=library,
    )
    if sends:
        keep_order(qualified, library)


def _not_traced(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, into which Dynamo does not look when an op is called between two graphs."""
    disabled = without_dynamo(run)

    @wraps(run)
    def called(*args: Any) -> Any:
        return (disabled if "torch._dynamo" in sys.modules else run)(*args)

    return called


def _refuse(name: str) -> Callable[..., Any]:
    def differentiate(*_: Any) -> Any:
        raise NotImplementedError(
            f"seqpar::{name} has no derivative: attention gives first derivatives only"
        )

    return differentiate
