"""What is drawn: a problem, the world it is solved in, how the call is used, and what the tensors hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor

from seqpar.strategies import STRATEGIES
from seqpar.testing import Case
from seqpar.testing.drawn import ALL_TERMS, cases

Use = Literal[
    "plain", "retained", "twice", "shared", "no_grad", "inference", "frozen", "hooked",
    "checkpointed", "summed", "with lse",
]  # fmt: skip
Values = Literal["normal", "steep", "huge", "tiny", "constant", "zero"]
Strides = Literal["plain", "heads first", "sliced", "width apart", "shared batch"]
INPUTS = ("q", "k", "v", "dout")
USES: tuple[Use, ...] = get_args(Use)
LENGTHS = st.one_of(st.integers(0, 9), st.integers(10, 48), st.sampled_from([65, 97, 129]))


@dataclass(frozen=True)
class Poison:
    """One position of an input, in all heads of the first batch entry, that is not finite."""

    name: str
    place: float  # 0 to 1: which of the positions
    value: float


@dataclass(frozen=True)
class Problem:
    """All that is drawn. It is printed when it fails, and can be pasted into a test."""

    case: Case
    size: int
    strategy: str
    implementation: Literal["reference", "aten"] | None
    use: Use
    values: Values
    strides: Strides
    poison: Poison | None

    def tensors(self) -> list[Tensor]:
        """q, k, v and dout, whole, without poison."""
        tensors = [x.clone() for x in self.case.tensors()]
        q, k, v, _ = tensors
        if self.values == "steep":  # a row sees one key and no other
            q *= 30
        if self.values == "huge":
            v *= 1e4 if self.case.dtype == torch.float16 else 1e30
        if self.values == "tiny":
            q *= 1e-30
            v *= 1e-30
        if self.values == "constant":
            k[:] = k[:, :1]
        if self.values == "zero":
            k.zero_()
        if self.use == "shared":
            tensors[1] = tensors[2] = q
        if self.use == "summed":
            tensors[3] = torch.ones_like(tensors[3])
        if self.strides == "shared batch":
            for x in tensors:
                x[:] = x[:1].clone()
        return tensors

    @property
    def poisoned(self) -> tuple[str, int] | None:
        """(which input, at which position), if any."""
        if self.poison is None or self.strides == "shared batch":  # which would share it
            return None
        of_keys = self.case.kv_length if self.poison.name in ("k", "v") else None
        length = self.case.length if of_keys is None else of_keys
        return None if length == 0 else (self.poison.name, int(self.poison.place * length))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any legal problem."""
    terms = draw(st.sampled_from([st.just({}), ALL_TERMS]))
    case = draw(cases(terms=terms, lengths=LENGTHS))
    use = draw(st.sampled_from(USES))
    if use == "shared":  # one tensor can be q, k and v
        of_keys = {"hq": case.hkv, "vd": case.d, "kv_length": None}
        if case.kv_length is not None:  # documents may be of both sequences
            of_keys["documents"] = None
        case = replace(case, **of_keys)
    strategy = draw(st.sampled_from(tuple(STRATEGIES)))
    stores, plain = (
        STRATEGIES[strategy].stores_scores,
        not (case.alibi or case.softcap or case.dropout) and case.bias is case.relative is None,
    )
    able = [None, "reference"] + ["aten"] * (plain and not stores and use != "with lse")
    poison = st.builds(
        Poison,
        st.sampled_from(INPUTS),
        st.floats(0, 0.999),
        st.sampled_from([float("nan"), float("inf")]),
    )
    return Problem(
        case,
        size=draw(st.integers(1, 8)),
        strategy=strategy,
        implementation=draw(st.sampled_from(able)),
        use=use,
        values=draw(st.sampled_from(("normal", "normal", *get_args(Values)))),
        strides=draw(st.sampled_from(get_args(Strides))),
        poison=draw(st.none() | st.none() | poison) if use in ("plain", "retained") else None,
    )


def strided(x: Tensor, how: Strides) -> Tensor:
    """The same numbers in memory of another order."""
    if how == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":
        return torch.nn.functional.pad(x, (1, 3))[..., 1 : 1 + x.shape[-1]]
    if how == "width apart":
        return x.mT.contiguous().mT
    if how == "shared batch":  # all of it is the first entry
        return x[:1].expand(x.shape)
    return x.contiguous()
