"""Shards know their layout: what `shard_sequence` gives is marked, and refused as rows of another one.

There are as many rows in both, and they would attend to the wrong keys without a word. Only the shard itself
is marked, not what is computed from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar.layout.shards import Layout
from seqpar_kernels.torch_internals import version

_MARK = "seqpar_layout"  # (the layout as text, how often the tensor had been written to)


def mark(x: Tensor, layout: Layout) -> Tensor:
    """The shard itself, marked as one of the layout."""
    # In inference mode nobody counts what is written to a tensor.
    if not (torch.compiler.is_compiling() or x.is_inference()):
        setattr(x, _MARK, (layout.code, version(x)))
    return x


def check_mark(x: Tensor, layout: Layout, name: str) -> None:
    """Refuses a shard of another layout.

    Raises:
        ValueError: it was cut by `shard_sequence` in another way, and not written to since.
    """
    marked = getattr(x, _MARK, None)
    if marked is None:
        return
    code, written = marked
    if code == layout.code or written != version(x):
        return
    cut = Layout.decoded(code)
    if cut.spans != layout.spans:
        raise ValueError(
            f"{name} was cut as {cut} and is taken for rows of {layout}; give the layout that it was cut by, "
            "or a clone() if it holds other rows by now"
        )
