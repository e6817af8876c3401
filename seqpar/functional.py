"""`attention`: the functional form of every strategy."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from seqpar.strategies import STRATEGIES, Plan, agree_on_call


def attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b sl hkv d"],
    v: Float[Tensor, "b sl hkv vd"],
    plan: Plan,
) -> Float[Tensor, "b sl hq vd"]:
    """This rank's rows of softmax(scale q k^T + mask) v over the whole sequence. All ranks must call.

    Equal to one-device attention for any number of ranks, any length and any head counts, gradients
    of q, k and v included. Query head h uses kv head h // (hq // hkv). A rank may hold no rows.

    Raises:
        TypeError: an argument is of the wrong kind, or a tensor not floating point.
        ValueError: shapes, devices, heads or rows do not fit together or do not fit the layout.
        NotImplementedError: the requested implementation does not serve this device and dtype.
        DesyncError: the ranks' calls differ, or another rank raised one of the above.
    """
    agree_on_call(q, k, v, plan)
    return STRATEGIES[plan.strategy](q, k, v, plan)
