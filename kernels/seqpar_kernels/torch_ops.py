"""`define`: an operator of torch in Python, whose first eager call imports no compiler.

`torch.library.custom_op` serves the same ends, but imports torch._dynamo, inductor and sympy when an op is
first called: 894 modules and 149 MB in every process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch

from seqpar_kernels.torch_internals import keep_order

_LIBRARY = torch.library.Library("seqpar", "FRAGMENT")  # an op ends with its library


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
        differentiate: its gradient; an op without one refuses to be differentiated.
        sends: whether ranks exchange messages inside, so that compilers must keep the order of calls.
    """
    qualified = f"seqpar::{name}"
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _not_traced(run), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(
        qualified, differentiate or _refuse(name), setup_context=save, lib=_LIBRARY
    )
    if sends:
        keep_order(qualified, _LIBRARY)


def _not_traced(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, into which Dynamo does not look when an op is called between two graphs."""
    disabled = cache(lambda: torch.compiler.disable(run))

    @wraps(run)
    def called(*args: Any) -> Any:
        return disabled()(*args) if "torch._dynamo" in sys.modules else run(*args)

    return called


def _refuse(name: str) -> Callable[..., Any]:
    def differentiate(*_: Any) -> Any:
        raise NotImplementedError(
            f"seqpar::{name} has no derivative: attention is differentiated once; leave out create_graph=True"
        )

    return differentiate
