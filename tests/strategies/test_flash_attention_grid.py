"""The parameter grid of flash-attn's own tests (`test_flash_attn_output`): each case is one direct call.

Lengths of queries and keys, at the bottom right; full, causal, local and local causal masks; ALiBi,
softcap, widths of heads that no kernel likes, and all, some or one kv head. Float64 is exact to 1e-11;
flash-attn asks for twice the error of a dense computation in the precision of their inputs.
Source: Dao 2023, flash-attn 2.7 (arXiv:2307.08691).
"""

from itertools import cycle, product

import pytest

from seqpar import simulate
from seqpar.testing import Case, errors_on_rank

LENGTHS = [
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (256, 512),
    (512, 256),
    (239, 240),
    (240, 239),
]
# As flash-attn draws them for "local": how many keys before and after a row it sees.
MASKS = {
    "full": (False, None),
    "causal": (True, None),
    "local": (False, (37, 19)),
    "local causal": (True, (41, 0)),
}
KV_HEADS = {"mha": 6, "gqa": 3, "mqa": 1}
WIDTHS = cycle([32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256])
RUNS = cycle(
    [
        (2, "ring", "zigzag"),
        (3, "ulysses", "contiguous"),
        (2, "allgather", "striped"),
        (1, "ring", "zigzag"),
    ]
)


def grid():
    """Every length with every mask, ALiBi and softcap, and the others in turn."""
    heads = cycle(KV_HEADS)
    for (rows, keys), mask, alibi, softcap in product(LENGTHS, MASKS, (False, True), (None, 50.0)):
        causal, window = MASKS[mask]
        kind, width, (size, strategy, layout) = next(heads), next(WIDTHS), next(RUNS)
        case = Case(
            rows, 6, KV_HEADS[kind], width, width, causal=causal, window=window, kind=layout,
            kv_length=keys, align="bottom-right", alibi=alibi, softcap=softcap,
        )  # fmt: skip
        words = f"{rows}-{keys}, {mask}, {kind} of {width}{', alibi' * alibi}{', softcap' * bool(softcap)}"
        yield pytest.param(case, size, strategy, id=words)


@pytest.mark.parametrize(("case", "size", "strategy"), list(grid()))
def test_equals_one_device(case, size, strategy):
    for rank, errors in enumerate(
        simulate(size, errors_on_rank, case, strategy, None, case.budget())
    ):
        assert not errors.failures, f"rank {rank}: {errors.failures}"
