"""Measures rounding errors against the number of ranks, and which bits depend on it.

Errors: bfloat16 against float64 attention on one device, for every strategy and P, beside two rings that
round to 16 bits between hops; what they emulate is said at `rounding_ring`. Bits: out and all gradients of
P ranks against those of one, `torch.equal`, with ALiBi, sinks and dropout. Ranks are threads of this
process. Exits with 1 when a typical error of ours at some P exceeds 1.5 times that at P = 1 (and where sums
are carried in float32 from block to block, when the largest does), or when bits differ that are promised to
be the same.

Example: python scripts/numerics.py --length 512 --ranks 1 2 4 8 --json numerics.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from seqpar import Group, Plan, Score, simulate
from seqpar.doctor import versions
from seqpar.layout import Layout
from seqpar.strategies import GRID_STRATEGIES, Strategy
from seqpar.testing import NAMES, Case, oracle, run_step
from seqpar_kernels import Implementation, Partial, Rows, attend, attend_backward, finish

GROWTH = 1.5  # times the error at P = 1 that is still no growth
FLOOR = (
    1e-4  # of the largest value, the same for every P: a fortieth of a rounding step of bfloat16
)
METRICS = ("typical", "largest")
STRATEGIES: dict[Strategy, str] = {  # with the layout it likes best under a causal mask
    "ring": "zigzag",
    "ulysses": "contiguous",
    "allgather": "zigzag",
    "mesh": "striped",
    "hybrid": "zigzag",
    "materialised_rows": "zigzag",
}
ROUNDING = {"16-bit blocks": torch.float32, "16-bit sums": torch.bfloat16}
TERMS: dict[str, Any] = {"softcap": 5.0, "alibi": True, "sinks": True, "dropout": 0.3}
BORDER = 64  # of the reference's tiles
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Claim:
    """A strategy whose bits are compared with its own at P = 1.

    Args:
        implementation: `None` is what is chosen on CPU for Ulysses: aten.
        promised: whether they must be the same.
    """

    strategy: Strategy
    case: Case
    implementation: Implementation | None
    promised: bool


def run(
    size: int, case: Case, strategy: Strategy, implementation: Implementation | None
) -> Results:
    """(out, dq, dk, dv) of a number of ranks in the order of positions, then the learned, summed."""
    if strategy in GRID_STRATEGIES:
        degree = max(n for n in range(1, isqrt(size) + 1) if size % n == 0)
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        case = replace(case, degree=divisors.index(degree))

    def on_each_rank(group: Group) -> Results:
        mine = case.layout(size).positions(group.rank)
        local = (x[:, mine] for x in case.tensors())
        return run_step(*local, case.plan(group, strategy, implementation)).results

    results = simulate(size, on_each_rank)
    order = torch.cat([case.layout(size).positions(rank) for rank in range(size)]).argsort()
    return tuple(
        torch.cat(shares, 1)[:, order] if name in NAMES else sum(shares)
        for name, *shares in zip(case.names, *results, strict=True)
    )


def rounding_ring(
    case: Case, layout: Layout, implementation: Implementation, kept: torch.dtype
) -> Results:
    """(out, dq, dk, dv) of a ring that gets every block's results in the 16 bits of its inputs.

    The ranks are worked through in turn. A hop's block is attended whole and its out, dq, dk and dv are
    rounded; lse stays in float32. out becomes out - sigmoid(block_lse - lse) (out - block_out); dq, and
    the sums of dk and dv that travel with their block, have the hop's added. Between hops all of these are
    in `kept`. Each merge is computed in float32 and rounded once, which is kinder than torch's own
    arithmetic on bfloat16 tensors.

    With float32 kept this is how ring-flash-attention and, by default, PyTorch's context parallelism treat
    numbers. With bfloat16 kept it is how the point-to-point ring of TransformerEngine treats out (which it
    weights by the lse of all hops instead), dq, dk and dv without FP8. Emulated are the roundings and the
    order of hops, not their kernels.
    """
    q, k, v, dout = (
        [x[:, layout.positions(rank)] for rank in range(layout.size)] for x in case.tensors()
    )
    plan, score = Plan(Group.alone(), layout, case.mask), Score().resolve(case.d)
    dtype, spans = case.dtype, layout.spans

    def meetings() -> Iterator[tuple[int, int, list[Any]]]:
        for hop in range(layout.size):
            for rank in range(layout.size):
                owner = (rank - hop) % layout.size
                blocks = list(plan.blocks(spans[rank], spans[owner], score, 0))
                if blocks:
                    yield rank, owner, blocks

    out: dict[int, Tensor] = {}
    lse: dict[int, Tensor] = {}
    for rank, owner, blocks in meetings():
        running = Partial.identity(q[rank], case.vd)
        for rows, cols, block in blocks:
            attend(
                q[rank][:, rows], k[owner][:, cols], v[owner][:, cols], block,
                into=running[rows], implementation=implementation,
            )  # fmt: skip
        block_out, block_lse = finish(running, dtype, implementation=implementation)
        if rank not in out:
            out[rank], lse[rank] = block_out.to(kept), block_lse
            continue
        weight = torch.sigmoid(block_lse - lse[rank]).unsqueeze(-1)
        before = out[rank].float()
        out[rank] = (before - weight * (before - block_out.float())).to(kept)
        lse[rank] = lse[rank] - F.logsigmoid(lse[rank] - block_lse)

    dq, dk, dv = ([torch.zeros_like(x, dtype=kept) for x in xs] for xs in (q, k, v))
    for rank, owner, blocks in meetings():
        mine = Rows.of(
            q[rank], out[rank].to(dtype), dout[rank], lse[rank], None, implementation=implementation
        )
        shares = [
            torch.zeros_like(x[n], dtype=torch.float32)
            for x, n in zip((q, k, v), (rank, owner, owner), strict=True)
        ]
        for rows, cols, block in blocks:
            into = shares[0][:, rows], shares[1][:, cols], shares[2][:, cols]
            attend_backward(
                mine[rows], k[owner][:, cols], v[owner][:, cols], block,
                into=into, implementation=implementation,
            )  # fmt: skip
        for total, share in zip((dq[rank], dk[owner], dv[owner]), shares, strict=True):
            total.copy_(total.float() + share.to(dtype).float())
    order = torch.cat([layout.positions(rank) for rank in range(layout.size)]).argsort()
    ranks = range(layout.size)
    return tuple(torch.cat([x[n].to(dtype) for n in ranks], 1)[:, order] for x in (out, dq, dk, dv))


def errors(got: Results, exact: Results) -> dict[str, dict[str, float]]:
    """How far results are off: by metric and name.

    `largest` is the largest error of an element over the largest value. `typical` is the root of the
    mean square, over positions and heads, of |error| / |value| of a row: the few long rows that see few
    keys count as much as the others. Rows that must be zero are left out: dq where one key is seen.
    """
    found: dict[str, dict[str, float]] = {metric: {} for metric in METRICS}
    for name, x, e in zip(NAMES, got, exact, strict=True):
        off = x.double() - e
        found["largest"][name] = float(off.abs().max() / e.abs().max())
        length = e.norm(dim=-1)
        rows = length > 1e-9 * length.max()
        found["typical"][name] = float(
            (off.norm(dim=-1)[rows] / length[rows]).square().mean().sqrt()
        )
    return {
        metric: {name: float(f"{x:.4g}") for name, x in by_name.items()}
        for metric, by_name in found.items()
    }


def measure_errors(case: Case, ranks: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
    """One record per strategy (or emulated ring), implementation and P."""
    seen = oracle.visible(case.length, case.causal, None)
    q, k, v, dout = (x.double() for x in case.tensors())
    exact = oracle.with_gradients(q, k, v, dout, seen, case.terms())
    implementations: tuple[Implementation, ...] = ("aten", "reference")
    subjects: list[tuple[str, Implementation | None]] = [
        (name, how)
        for name in (*STRATEGIES, *ROUNDING)
        for how in ((None,) if name.startswith("materialised") else implementations)
    ]
    records = []
    everything = [(*subject, size) for subject in subjects for size in ranks]
    for name, how, size in progress.track(everything, description="errors"):
        if name in ROUNDING:
            kind = "zigzag"
            layout = replace(case, kind=kind).layout(size)
            got = rounding_ring(case, layout, how or "reference", ROUNDING[name])
        else:
            kind = STRATEGIES[name]
            got = run(size, replace(case, kind=kind), name, how)
        records.append(
            {
                "name": name, "ours": name not in ROUNDING, "layout": kind,
                "implementation": how or "torch", "ranks": size, **errors(got, exact),
            }
        )  # fmt: skip
    return records


def grown(records: list[dict[str, Any]]) -> list[str]:
    """Which of our errors exceed 1.5 times that at P = 1, in words.

    The largest of aten is not judged: dk or dv of one of the first keys, which torch's op sums in 16 bits.
    """
    first = {(r["name"], r["implementation"]): r for r in records if r["ranks"] == 1}
    return [
        f"{r['name']} ({r['implementation']}), P = {r['ranks']}: {metric} error of {name} is "
        f"{error:.2e}, at P = 1 {one:.2e}"
        for r in records
        if r["ours"]
        for metric in (METRICS[:1] if r["implementation"] == "aten" else METRICS)
        for name, error in r[metric].items()
        if not error
        <= GROWTH * (one := first[r["name"], r["implementation"]][metric][name]) + FLOOR
    ]


def claims(length: int) -> list[Claim]:
    """What is promised to be the same bits for any P, and for contrast some that is not."""
    base = Case(length, 6, 2, d=16, vd=16, dtype=torch.float32, invariant=True, **TERMS)
    plain = Case(length, 6, 2, d=16, vd=16, dtype=torch.float32)
    cut = replace(base, hq=4, multiple_of=BORDER)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("contiguous", "zigzag", "striped"):
            case = replace(base, kind=kind, dtype=dtype)
            found.append(Claim("ulysses", case, "reference", promised=True))
        found.append(Claim("ulysses", replace(plain, dtype=dtype), None, promised=True))
        found.append(Claim("ring", replace(cut, dtype=dtype), "reference", promised=True))
        for kind in ("contiguous", "zigzag", "striped"):
            case = replace(cut, kind=kind, dtype=dtype)
            found.append(Claim("allgather", case, "reference", promised=True))
        loose = replace(base, invariant=None, dtype=dtype)
        for strategy, kind in STRATEGIES.items():
            if strategy != "ulysses":
                case = replace(loose, kind=kind)
                found.append(Claim(strategy, case, "reference", promised=False))
    return found


def measure_bits(length: int, ranks: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
    """One record per claim: for each P how many elements of each result differ, and by how much."""
    records = []
    for claim in progress.track(claims(length), description="bits"):
        one = run(1, claim.case, claim.strategy, claim.implementation)
        differences = {}
        for size in ranks:
            many = run(size, claim.case, claim.strategy, claim.implementation)
            differences[str(size)] = {
                name: difference(x, y)
                for name, x, y in zip(claim.case.names, one, many, strict=True)
            }
        records.append(
            {
                "strategy": claim.strategy, "layout": claim.case.kind,
                "multiple_of": claim.case.multiple_of,
                "implementation": claim.implementation or "aten",
                "dtype": str(claim.case.dtype).removeprefix("torch."),
                "promised": claim.promised, "differences": differences,
            }
        )  # fmt: skip
    return records


def difference(x: Tensor, y: Tensor) -> dict[str, float]:
    """Whether y is x, how many elements differ, and the largest difference in steps of the largest value."""
    off = float((x.double() - y.double()).abs().max())
    step = torch.finfo(x.dtype).eps * float(x.abs().max())
    return {
        "equal": torch.equal(x, y),
        "elements": x.numel(),
        "differ": int((x != y).sum()),
        "steps": float(f"{off / step:.4g}") if step else 0.0,
    }


def broken(records: list[dict[str, Any]]) -> list[str]:
    """Which promises of equal bits are not kept, in words."""
    return [
        f"{r['strategy']}, {r['layout']}, {r['implementation']}, {r['dtype']}: "
        f"{name} differs with {size} ranks"
        for r in records
        if r["promised"]
        for size, by_name in r["differences"].items()
        for name, found in by_name.items()
        if not found["equal"]
    ]


def show_errors(records: list[dict[str, Any]], console: Console) -> None:
    """Prints typical errors by P, and how both metrics grow."""
    ranks = sorted({r["ranks"] for r in records})
    table = Table(
        title="Typical error of a row in bfloat16, in thousandths; growth from P = 1 to the last"
    )
    for column in ("", "implementation", "result"):
        table.add_column(column)
    for column in (*(f"P={n}" for n in ranks), "growth", "of largest"):
        table.add_column(column, justify="right")
    for key in dict.fromkeys((r["name"], r["implementation"]) for r in records):
        of = {r["ranks"]: r for r in records if (r["name"], r["implementation"]) == key}
        for name in NAMES:
            typical, largest = ([of[n][metric][name] for n in ranks] for metric in METRICS)
            cells = [f"{1e3 * x:.2f}" for x in typical]
            growth = [f"{x[-1] / x[0]:.2f}" if x[0] else "-" for x in (typical, largest)]
            table.add_row(*key, name, *cells, *growth, end_section=name == NAMES[-1])
    console.print(table)


def show_bits(records: list[dict[str, Any]], console: Console) -> None:
    """Prints for every P whether all results are equal, else the share of their elements that differs."""
    ranks = list(records[0]["differences"]) if records else []
    table = Table(
        title="Bits against P = 1: equal, or the share of elements that differ; largest difference"
    )
    for column in ("strategy", "layout", "implementation", "dtype", "promised"):
        table.add_column(column)
    for column in (*(f"P={n}" for n in ranks), "steps"):
        table.add_column(column, justify="right")
    for r in records:
        by_size = r["differences"]
        cells = []
        for found in by_size.values():
            differ, elements = (sum(x[n] for x in found.values()) for n in ("differ", "elements"))
            equal = all(x["equal"] for x in found.values())
            cells.append("equal" if equal else f"{100 * differ / elements:.2g} %")
        steps = max((found[n]["steps"] for found in by_size.values() for n in NAMES), default=0.0)
        table.add_row(
            r["strategy"], r["layout"], r["implementation"], r["dtype"],
            "yes" if r["promised"] else "no", *cells, f"{steps:.2g}",
        )  # fmt: skip
    console.print(table)


def by_lines(found: dict[str, Any]) -> str:
    """JSON with a line for every entry and for every record of a list, which can be read and compared."""
    entries = []
    for name, value in found.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(x) for x in value) + "\n]"
        entries.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main() -> None:
    """Parses arguments, measures, prints; fails when errors grow with P or promised bits differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens, where errors are measured"
    )
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--d", type=int, default=64, help="width of a head")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=list(range(1, 9)),
        help="P of the errors; 1 is added",
    )
    parser.add_argument(
        "--bits-length", type=int, default=460, help="tokens, where bits are compared"
    )
    parser.add_argument("--bits-ranks", type=int, nargs="+", default=[2, 3, 4, 5, 7, 8])
    parser.add_argument(
        "--date", default=datetime.date.today().isoformat(), help="written to the JSON"
    )
    parser.add_argument("--json", type=Path, help="write both tables here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    case = Case(args.length, args.heads, args.kv_heads, args.d, args.d, dtype=torch.bfloat16)
    with Progress(console=Console(stderr=True)) as progress:
        errors_found = measure_errors(case, sorted({1, *args.ranks}), progress)
        bits_found = measure_bits(args.bits_length, args.bits_ranks, progress)
    console = Console(width=140)
    show_errors(errors_found, console)
    show_bits(bits_found, console)
    failures = grown(errors_found) + broken(bits_found)
    if args.json:
        setting = {
            "length": args.length, "heads": args.heads, "kv_heads": args.kv_heads, "d": args.d,
            "dtype": "bfloat16", "causal": True,
        }  # fmt: skip
        found = {
            "date": args.date, "versions": versions(), "command": shlex.join(sys.argv),
            "setting": setting, "errors": errors_found, "bits_length": args.bits_length,
            "bits": bits_found, "failures": failures,
        }  # fmt: skip
        args.json.write_text(by_lines(found))
    for failure in failures:
        print(f"FAILED {failure}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
