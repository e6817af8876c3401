"""A first call costs no compiler: neither importing seqpar nor attending imports one."""

import subprocess
import sys

CODE = """
import sys
import torch
import seqpar
from seqpar.strategies import STRATEGIES

HEAVY = ("torch._dynamo", "torch._inductor", "triton", "sympy", "transformers")


def first_call(group, strategy):
    layout = seqpar.zigzag(12, group.size)
    x = torch.randn(1, layout.rows[group.rank], 2, 8, requires_grad=True)
    grid = group.grid(ulysses=2) if STRATEGIES[strategy].needs_grid else None
    plan = seqpar.Plan(group, layout, strategy=strategy, grid=grid)
    seqpar.attention(x.sin(), x.cos(), x, plan).sum().backward()


for size in (1, 2):
    for strategy in STRATEGIES:
        if size == 2 or not STRATEGIES[strategy].needs_grid:
            seqpar.simulate(size, first_call, strategy)
            print(size, strategy, *(name for name in HEAVY if name in sys.modules))
"""


def test_no_strategy_imports_a_compiler_forward_or_backward():
    """As `torch.library.custom_op` did when an op was first called: 894 modules, 149 MB."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 14
    assert all(len(line) == 2 for line in lines), lines
