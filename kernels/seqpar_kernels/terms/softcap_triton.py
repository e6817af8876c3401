"""What `Softcap` does in the Triton kernels. Values are (cap,)."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def score(s, place, values):
    """(c tanh(s / c), 1 - tanh^2)."""
    bent = tanh(s / values[0])
    return bent * values[0], 1.0 - bent * bent


@triton.jit
def tanh(x):
    """Within one rounding step or two of float32. Source: Moshier, Cephes, tanhf."""
    z = x * x
    near = -5.70498872745e-3
    near = near * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    far = tl.where(x < 0, -far, far)
    return tl.where(a < 0.625, near, far)
