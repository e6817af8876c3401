"""Whether a declared layout is the one that a model splits its fused projection by: the model itself tells.

`check_layout` runs it with made-up outputs in the place of the projection's and looks at what reaches the
output projection. `check_split` asks a function that splits. Neither reads a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from seqpar.tensor_parallel.fused_probe import FusedProbe
from seqpar.tensor_parallel.fused_qkv import Component, FusedQKV

CHANGED = (
    1e-5  # of values in -1 ... 1: far above float32's rounding, far below what a changed score does
)


def check_split(layout: FusedQKV, split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
    """Raises unless a function splits a fused projection's output as the layout says, row by row.

    Args:
        split: from `[1, 1, rows]` to q, k and v of any shape whose elements are in order of heads; k and v
            may be repeated for the query heads that they serve. As `_split_heads` of many models.

    Raises:
        ValueError: it does not.
    """
    parts = split(torch.arange(layout.rows).view(1, 1, -1))
    for component, part in zip(get_args(Component), parts, strict=True):
        found = part.flatten().tolist()
        repeat = layout.num_heads // layout.num_kv_heads if component != "q" else 1
        heads = layout.num_heads // repeat
        if len(found) not in (heads * layout.head_dim, layout.num_heads * layout.head_dim):
            raise ValueError(
                f"the layout has {heads} heads of {layout.head_dim} of {component}, the split gives "
                f"{len(found)} rows"
            )
        served = len(found) // (heads * layout.head_dim)  # 1, or the query heads of a kv head
        for place, row in enumerate(found):
            head, i = divmod(place, layout.head_dim)
            want = layout.index(component, head // served)[i]
            if row != want:
                raise ValueError(
                    f"row {i} of {component} of head {head // served} is row {want} of the weight by the "
                    f"layout, but the split takes row {row}, by the layout {_owner(layout, row)}"
                )


def check_layout(
    layout: FusedQKV, module: nn.Module, *, fused: str, out: str, call: Callable[[], object]
) -> None:
    """Raises unless the model's own forward splits its fused projection as the layout says.

    What is proved. Of v every row: where a row holds one number at all positions, any softmax gives that
    number back, so which row arrives at which query head is read off the input of the output projection. Of q
    and k every head, as a set of rows: changing its declared rows at the first position, and of q at the
    last, must change the attention of exactly its query heads, at exactly the positions where it can. Not
    proved: the order of the rows within a head of q and of k, which no cut by heads depends on, and of a
    square weight whether it is transposed.

    Rotary positions, masks, ALiBi, softcaps, norms within a head and clipping at 1 or more are no hindrance.
    Norms of q or k across heads and windows of one key are: they are refused though the layout may be right.
    The model runs as far as the output projection; hooks are removed, after an error too.

    Args:
        module: holds both projections; in eval mode, in float32 or wider.
        fused: path in it of the module whose output is the fused q, k and v, in its last dimension.
        out: path in it of the module whose input is the attention's output, head by head.
        call: runs the attention on one sequence of 3 positions or more, without a cache: the whole
            model, or only the module.

    Raises:
        ValueError: the layout is not that of the model, or the module or the call is not as above.
        NotImplementedError: attention is not a softmax, or has sinks.
    """
    probe = FusedProbe(layout, module, fused, out, call)
    probe.check_weight()
    with torch.no_grad():
        positions = probe.count_positions()
        _check_v(layout, probe, positions)
        _check_q_and_k(layout, probe, positions)


def _check_v(layout: FusedQKV, probe: FusedProbe, positions: int) -> None:
    """Reads off, one binary digit at a time, which row arrives at each row of each query head."""
    number = torch.arange(1, layout.rows + 1)  # 0 is what arrives from nowhere
    nothing = probe.attend(torch.zeros(positions, layout.rows))
    arrived = torch.zeros(nothing.shape, dtype=torch.long)
    for digit in range(layout.rows.bit_length()):
        rows = (number >> digit & 1).double().expand(positions, -1)
        got = (probe.attend(rows) - nothing).cpu()
        ones = got > 0.5
        if (off := (got - ones.to(got)).abs()).max() > 0.01:
            raise NotImplementedError(
                f"where all positions hold the same 0 or 1 in a row, {probe.out} must read it, got "
                f"{got.flatten()[off.argmax()].item():.3g}: this attention is no average of v; if a function "
                "splits the fused projection, check_split can ask that"
            )
        arrived += ones.long() << digit
    group = layout.num_heads // layout.num_kv_heads
    for head in range(layout.num_heads):
        want = torch.tensor(layout.index("v", head // group))
        wrong = (arrived[:, head] - 1 != want).nonzero()
        if len(wrong):
            position, i = wrong[0].tolist()
            row = int(arrived[position, head, i]) - 1
            found = (
                f"row {row}, by the layout {_owner(layout, row)}" if row >= 0 else "no row of it"
            )
            raise ValueError(
                f"query head {head} must be given v of kv head {head // group}, whose row {i} is row "
                f"{int(want[i])} of the weight by the layout; the model gives it {found}"
            )


def _check_q_and_k(layout: FusedQKV, probe: FusedProbe, positions: int) -> None:
    """Changes one head of q or k at a time and looks whose attention changes, and where."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(2, positions, layout.rows, generator=generator, dtype=torch.float64)
    rows = (0.5 + drawn[0] / 2) * torch.where(drawn[1] < 0.5, -1.0, 1.0)  # none is near 0
    v, nothing = layout.split(torch.arange(layout.rows))[2], rows.clone()
    nothing[:, v] = 0
    # what a position attends then shows as one number, the same in a whole head
    rows[:, v] = torch.linspace(-1, 1, positions, dtype=torch.float64)[:, None]
    base = probe.attend(rows)
    uneven = base - probe.attend(nothing)
    uneven = (uneven - uneven[..., :1]).abs().amax((0, 2)) > CHANGED
    if uneven.any():
        raise ValueError(
            f"heads of {layout.head_dim} rows must attend as one, but within query head "
            f"{int(uneven.nonzero()[0])} rows attend differently: heads are narrower in the model"
        )

    def changed(at: range, where: list[int]) -> Tensor:
        """[s hq]: whose attention changes where, for changed rows at some positions."""
        changed_rows = rows.clone()
        place = torch.tensor(where)[:, None], torch.tensor(at)
        changed_rows[place] = -rows[place]
        return ((probe.attend(changed_rows) - base).abs().amax(-1) > CHANGED).cpu()

    heads = torch.arange(layout.num_heads)
    for head in range(layout.num_heads):
        seen = changed(layout.index("q", head), [0, positions - 1])
        if seen[1:-1].any():
            raise ValueError(
                f"{_rows(layout, 'q', head)} hold no q only: changed at the first position, they change what "
                f"query heads {_list(seen[1:-1].any(0))} attend at others, as keys do"
            )
        if not torch.equal(seen[-1], heads == head):
            raise ValueError(
                f"{_rows(layout, 'q', head)} must decide what query head {head} alone attends; changed, they "
                f"change query heads {_list(seen[-1])}"
            )
    group = layout.num_heads // layout.num_kv_heads
    for head in range(layout.num_kv_heads):
        seen = changed(layout.index("k", head), [0])[1:].any(0)
        if not torch.equal(seen, heads // group == head):
            raise ValueError(
                f"{_rows(layout, 'k', head)} must be the keys of query heads "
                f"{_list(heads // group == head)}; changed, they change query heads {_list(seen)}"
            )


def _rows(layout: FusedQKV, component: Component, head: int) -> str:
    at = layout.index(component, head)
    return f"rows {at.start} ... {at.stop - 1}, by the layout {component} of head {head},"


def _list(heads: Tensor) -> str:
    return ", ".join(str(int(head)) for head in heads.nonzero()) or "none"


def _owner(layout: FusedQKV, row: int) -> str:
    """What a row of the weight is by the layout, in words."""
    for component in get_args(Component):
        heads = layout.num_heads if component == "q" else layout.num_kv_heads
        for head in range(heads):
            at = layout.index(component, head)
            if row in at:
                return f"row {row - at.start} of {component} of head {head}"
    raise AssertionError(row)
