"""What Triton compiles of a case: a kernel, specialised on arguments as its launcher would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from triton.compiler import ASTSource

from ahead_of_time.cases import BANDS, Case
from seqpar_kernels import Block, Dropout, Ranges, Rows, Score, triton_attention, tuning
from seqpar_kernels.partial import Partial, accumulation_dtype

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
HEADS, KV_HEADS, BATCH = 32, 8, 2


@dataclass(frozen=True)
class Launch:
    """What a kernel was launched with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def make_block(case: Case) -> Block:
    """A square block with the case's mask and feature."""
    slopes = torch.rand(HEADS) if case.feature == "alibi" else None
    softcap = 30.0 if case.feature == "softcap" else None
    score = Score(case.d**-0.5, softcap=softcap, alibi_slopes=slopes)
    drop = Dropout(0.1, 2**62) if case.feature == "dropout" else None
    documents = Ranges.documents((0, case.length // 2)) if case.feature == "documents" else None
    terms = tuple(term for term in (documents, drop) if term is not None)
    return Block(BANDS[case.mask], score, terms=terms)


def launch(case: Case) -> Launch:
    """The arguments that the launcher gives the kernel."""
    launched: dict[Any, Launch] = {}

    def record(kernel: Any, _programs: int, _on: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        launched[kernel] = Launch(args, kwargs)

    dtype, block, tiles = getattr(torch, case.dtype), make_block(case), tuning.Tiles(*case.tiles)
    meta = {"dtype": dtype, "device": "meta"}
    q, dout, out = (torch.empty(BATCH, case.length, HEADS, case.d, **meta) for _ in range(3))
    k, v = (torch.empty(BATCH, case.length, KV_HEADS, case.d, **meta) for _ in range(2))
    with patch.multiple(triton_attention, family=lambda _: case.target, launch=record):
        if case.kernel == "forward":
            triton_attention.forward(q, k, v, block, Partial.identity(q, case.d), tiles)
        else:
            into = tuple(torch.empty_like(x, dtype=accumulation_dtype(dtype)) for x in (q, k, v))
            lse, delta, by_row = (into[0][..., 0].contiguous() for _ in range(3))
            learned = {name: by_row for name in block.score.tensors}
            rows = Rows(q, out, dout, lse, delta)
            triton_attention.backward(rows, k, v, block, into, learned, tiles=(tiles, tiles))
    return launched[getattr(triton_attention, f"{case.kernel}_kernel")]


def make_source(case: Case) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles, and its options, specialised on arguments as its launcher would."""
    kernel, launched = getattr(triton_attention, f"{case.kernel}_kernel"), launch(case)
    given = dict(zip(kernel.arg_names, launched.args, strict=False)) | launched.kwargs
    options = {name: given.pop(name) for name in list(given) if name not in kernel.arg_names}
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def specialised(x: Any, path: tuple[int, ...], as_it_is: bool) -> Any:
        """The type of an argument, whose constants and attributes are noted by its path."""
        if isinstance(x, tuple):
            return tuple(specialised(y, (*path, n), as_it_is) for n, y in enumerate(x))
        special = isinstance(x, int) and not as_it_is
        if special and x == 1:
            constants[path] = x
            return "constexpr"
        if isinstance(x, torch.Tensor) or (special and x % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if case.target == "gfx942" and is_small(x):
            attributes[path].append(["tt.pointer_range", 32])
        return type_name(x)

    for n, parameter in enumerate(kernel.params):
        x = given[parameter.name]
        if parameter.is_constexpr:
            types[parameter.name], constants[n,] = "constexpr", x
        else:
            types[parameter.name] = specialised(x, (n,), bool(parameter.do_not_specialize))
    return ASTSource(kernel, types, constants, attributes), options


def type_name(x: torch.Tensor | float) -> str:
    """What Triton calls the type of an argument."""
    if isinstance(x, torch.Tensor):
        return POINTERS[x.dtype]
    if isinstance(x, float):
        return "fp32"
    return "i32" if -(2**31) <= x < 2**31 else "i64"


def is_small(x: Any) -> bool:
    """Whether 32-bit offsets reach all of a tensor, which the HIP back-end makes use of."""
    return isinstance(x, torch.Tensor) and x.numel() * x.element_size() < 2**31
