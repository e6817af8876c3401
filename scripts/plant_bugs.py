"""Plants one bug at a time in a copy of the package and records which checks notice.

Each plant is a change of one line that keeps the code running. A plant that no check notices is a
hole in the tests: the script then exits with 1. The result is the table in docs/testing.md.

Example: python scripts/plant_bugs.py --markdown plants.md
         python scripts/plant_bugs.py --only "forgotten gradient hop"
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 300
NOT_CHECKED = {
    "seqpar/data.py",
    "seqpar/loss.py",
    "seqpar/compiled.py",
    "seqpar/checkpointing.py",
    "seqpar/functional.py",
    "seqpar/comm/tape.py",
    "seqpar/strategies/check.py",
    "kernels/seqpar_kernels/custom_ops.py",
}  # check_equivalence.py is blind to these


@dataclass(frozen=True)
class Plant:
    """A bug: in `file`, the one place that reads `old` becomes `new`; `test` should notice."""

    name: str
    file: str
    old: str
    new: str
    test: str = "tests/strategies/test_equivalence.py"


LAYOUT, BLOCK, COMM = "seqpar/layout", "kernels/seqpar_kernels", "seqpar/comm"
TERMS, STORED, OPS = (f"tests/block/test_{x}.py" for x in ("terms", "row_softmax", "custom_ops"))
KEEP, COMPILE = (f"tests/strategies/test_{x}.py" for x in ("keep_attention", "compile"))
LOOP = "seqpar/strategies/blockwise.py"
PLANTS = [
    Plant("causal diagonal off by one in the mask", f"{LAYOUT}/mask.py",
          "ahead = 0 if self.causal", "ahead = 1 if self.causal", "tests/layout"),
    Plant("causal diagonal off by one in the rectangles", f"{BLOCK}/rectangles.py",
          "causal = min(cols.stop, first + upper)",
          "causal = min(cols.stop, first + upper + 1)", "tests/block"),
    Plant("causal diagonal off by one in the reference", f"{BLOCK}/reference.py",
          "visible &= offset <= band.upper", "visible &= offset <= band.upper + 1", "tests/block"),
    Plant("window one key short", f"{LAYOUT}/mask.py",
          "back = None if self.window is None else self.window - 1",
          "back = None if self.window is None else max(0, self.window - 2)", "tests/layout"),
    Plant("window edge not masked", f"{BLOCK}/rectangles.py",
          "inner = min(max(0, strip[-1] + band.lower), num_cols)",
          "inner = min(max(0, strip[-1] + band.lower - 1), num_cols)", "tests/block"),
    Plant("stride of a striped band rounded the wrong way", f"{LAYOUT}/mask.py",
          "upper=None if ahead is None else (apart + ahead) // rows.step",
          "upper=None if ahead is None else -((-apart - ahead) // rows.step)", "tests/layout"),
    Plant("tiles joined that do not continue", f"{LAYOUT}/tiles.py",
          "return both_full or drawn_on == below.band", "return below.work > 0", "tests/layout"),
    Plant("merge without weights", f"{BLOCK}/partial.py",
          "keep, add = torch.exp(self.m - top), torch.exp(m - top)",
          "keep, add = torch.exp(self.m - top), torch.ones_like(m)", "tests/block"),
    Plant("merge forgets to rescale the sum", f"{BLOCK}/partial.py",
          "self.l.mul_(keep).add_(", "self.l.add_(", "tests/block"),
    Plant("float32 sums in float64", f"{BLOCK}/partial.py",
          "return torch.float64 if dtype == torch.float64 else torch.float32",
          "return torch.float32", "tests/block"),
    Plant("replicated kv head not summed", f"{COMM}/heads.py",
          "heads.add_(shares[r][n]) if adds else", "heads.copy_(shares[r][n]) if adds else", "tests/comm"),
    Plant("heads dealt to the wrong kv head", f"{LAYOUT}/heads.py",
          "aligned = head % group == 0 and q_stop - head >= group",
          "aligned = q_stop - head >= group", "tests/layout"),
    Plant("rows restored in rank order", "seqpar/data.py",
          "return gathered.index_select(dim, layout.inverse().to(x.device))", "return gathered",
          "tests/data"),
    Plant("labels sharded before they are shifted", "seqpar/data.py",
          "shifted[:, :-1] = labels[:, 1:]", "shifted[:, :-1] = labels[:, :-1]", "tests/data"),
    Plant("mean of means", "seqpar/loss.py",
          "        all_reduce_(count, group)\n", "        count = count * group.size\n", "tests/data"),
    Plant("agreement ignores the mask", "seqpar/strategies/check.py",
          '        "mask": plan.mask,\n', "", "tests/strategies/test_bad_input.py"),
    Plant("bytes of the backward not counted", f"{COMM}/traffic.py",
          "self.by_primitive.get(primitive, Count()) + count", "count"),
    Plant("triton: a row sees one column too many", f"{BLOCK}/triton_terms.py",
          "end = tl.minimum(index + upper + 1, num_others)",
          "end = tl.minimum(index + upper + 2, num_others)", TERMS),
    Plant("triton: one tile too many taken as seen whole", f"{BLOCK}/triton_terms.py",
          "inner = tl.cdiv(tl.max(first, 0), TILE)", "inner = tl.max(first, 0) // TILE", TERMS),
    Plant("triton: the last tile not visited", f"{BLOCK}/triton_terms.py",
          "stop = tl.maximum(tl.cdiv(tl.max(end, 0), TILE), start)",
          "stop = tl.maximum(tl.max(end, 0) // TILE, start)", TERMS),
    Plant("triton: carried sum not rescaled", f"{BLOCK}/triton_forward.py",
          "l = l * shrink + tl.sum(p, 1)", "l = l + tl.sum(p, 1)", TERMS),
    Plant("triton: key tiles walked upwards", f"{BLOCK}/triton_forward.py",
          "acc, m, l, q, K, V, high - 1 - n,", "acc, m, l, q, K, V, low + n,", TERMS),
    Plant("triton: dq walks key tiles upwards", f"{BLOCK}/triton_backward.py",
          "t = high - 1 - n", "t = low + n", TERMS),
    Plant("triton: heads of a group outside query tiles", f"{BLOCK}/triton_backward.py",
          "t, h = n // GROUP, g * GROUP + n % GROUP",
          "t, h = low + (n - low * GROUP) % (high - low),"
          " g * GROUP + (n - low * GROUP) // (high - low)", TERMS),
    Plant("triton: dk without the scale", f"{BLOCK}/triton_backward.py",
          "return dropped, ds, ds * (bend * scale)", "return dropped, ds, ds * bend", TERMS),
    Plant("triton: derivative of the softcap forgotten", f"{BLOCK}/triton_terms.py",
          "bend = 1.0 - bent * bent", "bend = 1.0 + bent * 0.0", TERMS),
    Plant("triton: tanh two digits short", f"{BLOCK}/triton_terms.py",
          "near = near * z - 3.33332819422e-1", "near = near * z - 3.3334e-1", TERMS),
    Plant("triton: ALiBi on local columns", f"{BLOCK}/triton_terms.py",
          "return tl.abs((i - j) * step + apart)", "return tl.abs((i - j) * step)", TERMS),
    Plant("triton: dropout on local rows", f"{BLOCK}/triton_terms.py",
          "r, c = row + i * step, col + j * step", "r, c = i * step, col + j * step", TERMS),
    Plant("triton: dropout in another head backwards", f"{BLOCK}/triton_backward.py",
          "x, dp, lse[None, :], delta[None, :], visible, batch, h + head0,",
          "x, dp, lse[None, :], delta[None, :], visible, batch, h,", TERMS),
    Plant("triton: dropout not in dp", f"{BLOCK}/triton_backward.py",
          "dp = tl.where(kept, dp * factor, 0.0)", "dp = dp * 1.0", TERMS),
    Plant("triton: packed heads share one slope", f"{BLOCK}/triton_forward.py",
          "i, head = index // PACK, h + index % PACK", "i, head = index // PACK, h + index * 0", TERMS),
    Plant("triton: 32-bit offsets of a batch", f"{BLOCK}/triton_forward.py",
          "b64, h64, g64 = batch.to(tl.int64), h.to(tl.int64), (h // GROUP).to(tl.int64)",
          "b64, h64, g64 = batch, h, h // GROUP", TERMS),
    Plant("triton: 32-bit offsets inside a tile", f"{BLOCK}/triton_attention.py",
          '"WIDE": tallest >= 2**31', '"WIDE": False', TERMS),
    Plant("document of a row one column short", f"{BLOCK}/documents.py",
          "return (-((others - both) // step)).clamp_",
          "return ((both - others) // step).clamp_", TERMS),
    Plant("sink not in the sum", f"{BLOCK}/partial.py",
          "total = self.l * keep + torch.exp(sinks - top)", "total = self.l * keep", TERMS),
    Plant("gradient of the sinks has the wrong sign", f"{BLOCK}/score.py",
          "shares = -(torch.exp(", "shares = (torch.exp(", TERMS),
    Plant("slopes of other heads", f"{BLOCK}/score.py",
          "heads = slice(start, start + num_heads)", "heads = slice(0, num_heads)"),
    Plant("positions of joined tiles", "seqpar/strategies/plan.py",
          "made = tiles if needs_positions else tall_tiles", "made = tall_tiles"),
    Plant("stored softmax: maxima of pieces not carried", f"{BLOCK}/triton_softmax.py",
          "l = l * tl.exp2((m - origin) * LOG2E) + tl.sum(p, 1)", "l = l + tl.sum(p, 1)", STORED),
    Plant("stored softmax: delta of a piece alone", f"{BLOCK}/triton_softmax.py",
          "total = tl.load(total_at, mask=there, other=0.0)",
          "total = tl.load(total_at, mask=there, other=0.0) * 0.0", STORED),
    Plant("op: fake lse in the type of q", f"{BLOCK}/custom_ops.py",
          "return out, q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))",
          "return out, q.new_empty(q.shape[:-1], dtype=torch.float32)", OPS),
    Plant("op: documents not handed on", f"{BLOCK}/custom_ops.py",
          "documents=None if documents is None else Documents(tuple(documents))", "documents=None", OPS),
    Plant("dropout in evaluation mode", "seqpar/module.py",
          "self.dropout if self.training else None", "self.dropout", "tests/strategies/test_autograd.py"),
    Plant("op: lse said to be differentiable", f"{BLOCK}/custom_ops.py",
          "    if not ctx.lse_learns:", "    if False:", OPS),
    Plant("gradient hop forgotten", f"{COMM}/ring.py",
          "        elif share is not None:\n            sends",
          "        elif share is not None and (goes_on or step < 2):\n            sends", "tests/comm"),
    Plant("gradient sum forgotten on arrival", f"{COMM}/ring.py",
          "            share += self._arrived", "            share += 0 * self._arrived", "tests/comm"),
    Plant("ring receives into the buffer it sends", f"{COMM}/ring.py",
          "buffer = self._buffers[step % 2]", "buffer = self._buffers[0]", "tests/comm"),
    Plant("block used before it arrived", f"{COMM}/ring.py",
          "        pending.wait()\n        held = arriving", "        held = arriving", "tests/comm"),
    Plant("a far visitor forgotten", f"{COMM}/ring.py",
          "                sends += [(trip.at(step + 1), x) for x in own]",
          "                sends += []", "tests/comm"),
    Plant("sums in order do not continue", f"{COMM}/ring.py",
          "            self._share, self._arrived = self._arrived, None",
          "            self._share = None", "tests/strategies/test_invariance.py"),
    Plant("a needless hop", "seqpar/strategies/ring.py",
          "    wants = cache(lambda visitor, owner: plan.sees(rows[visitor], keys[owner]))",
          "    wants = cache(lambda visitor, owner: True)", "tests/strategies/test_volume.py"),
    Plant("local instead of global lse in backward", LOOP,
          "ctx.save_for_backward(q, k, v, slopes, sinks, out, lse)",
          "ctx.save_for_backward(q, k, v, slopes, sinks, out, running.m)"),
    Plant("gradient of lse forgotten", LOOP,
          "dout, lse, dlse, implementation", "dout, lse, None, implementation",
          "tests/strategies/test_lse.py"),
    Plant("dk and dv swapped", LOOP, "for x in (into.dq, into.dk, into.dv))",
          "for x in (into.dq, into.dv, into.dk))"),
    Plant("dq in the strides of q", LOOP,
          "return torch.zeros(like.shape, dtype=self.dtype, device=like.device)",
          "return torch.zeros_like(like, dtype=self.dtype)",
          "tests/strategies/test_autograd.py"),
    Plant("another implementation than was asked for", LOOP,
          "into=running[rows], implementation=plan.implementation,", "into=running[rows],",
          "tests/strategies/test_autograd.py"),
    Plant("slopes summed rank by rank", LOOP,
          "    if not plan.invariant or group.size == 1:", "    if True:",
          "tests/strategies/test_invariance.py"),
    Plant("dropout draws the heads of its rank", "seqpar/strategies/chunks.py",
          "yield Run(start + s.q.start, s.q,", "yield Run(s.q.start, s.q,"),
    Plant("a chunk later, the first kv heads", "seqpar/strategies/chunks.py",
          "            at = first - kv_start", "            at = 0", "tests/strategies/test_head_chunks.py"),
    Plant("query heads of a kv head added at once", f"{COMM}/heads.py",
          "    first, *others = x.unflatten(2, (-1, group)).unbind(3)",
          "    return x.unflatten(2, (-1, group)).sum(3)\n"
          "    first, *others = x.unflatten(2, (-1, group)).unbind(3)",
          "tests/strategies/test_invariance.py"),
    Plant("partials of a mesh merged without their maxima", f"{BLOCK}/partial.py",
          "other.m.where(seen, torch.finfo(other.m.dtype).min)",
          "self.m.where(seen, torch.finfo(other.m.dtype).min)"),
    Plant("a mesh keeps the queries' gradients of others", "seqpar/strategies/mesh.py",
          "                    x += y", "                    x += y if _ is None else x * 0 + y * 0.5"),
    Plant("all-gather in order walks keys upwards", "seqpar/strategies/allgather.py",
          "lambda n, _: by_key[-1 - n]", "lambda n, _: by_key[n]",
          "tests/strategies/test_invariance.py"),
    Plant("partial tiles not padded", f"{BLOCK}/reference.py",
          "tile = x.new_zeros(b, h, group, TILE, width, dtype=dtype)",
          "tile = x.new_zeros(b, h, group, length, width, dtype=dtype)", "tests/block/test_bits.py"),
    Plant("documents not looked at where hops are skipped", f"{LAYOUT}/visible.py",
          "for start, stop in _shared_documents(mask.bounds, rows, cols):",
          "for start, stop in _shared_documents((0,), rows, cols):", "tests/layout"),
    Plant("stored scores: columns in rank order", "seqpar/strategies/stored_scores.py",
          "return x[..., self.cols.inverse()]", "return x",
          "tests/strategies/test_materialised.py"),
    Plant("stored scores: sums not made relative to the common maximum",
          "seqpar/strategies/stored_scores.py",
          "sums.mul_(torch.exp(before - torch.where(tops == -torch.inf, 0.0, tops)))",
          "sums.mul_(1.0)", "tests/strategies/test_materialised.py"),
    Plant("dropout not asked of the implementation", "seqpar/strategies/check.py",
          "Request.of(q, v, score, plan.drops, plan.packed, lse=with_lse)",
          "Request.of(q, v, score, lse=with_lse)", "tests/strategies/test_bad_input.py"),
    Plant("keys' layout not agreed on", "seqpar/strategies/check.py",
          '        "kv_layout": plan.kv_layout,\n        "spans of keys": hash(plan.keys.spans),\n', "",
          "tests/strategies/test_bad_input.py"),
    Plant("an exchange begun again when recomputed", f"{COMM}/flight.py",
          "        if not plays():\n            flight.begin(xs, dual=False)",
          "        flight.begin(xs, dual=False)", KEEP),
    Plant("kept results written to unnoticed", f"{COMM}/tape.py",
          "if x._version != version:", "if False:", KEEP),
    Plant("another call when recomputed unnoticed", f"{COMM}/tape.py",
          "if recorded != call:", "if False:", KEEP),
    Plant("compiled: results taken for what is kept", "seqpar/compiled.py",
          "kept = *output[num_results:], *output[:num_results]", "kept = output", COMPILE),
    Plant("steps inside of a step kept as well", f"{COMM}/tape.py",
          "outside = _CURRENT.set(None)", "outside = _CURRENT.set(tape)", KEEP),
    Plant("ranks agree again on what is kept", "seqpar/functional.py",
          "        return resolve(plan, q, v, with_lse=with_lse)\n", "        pass\n", KEEP),
    Plant("autocast left out", "seqpar/functional.py",
          "return tuple(x.to(dtype) if cast else x for", "return tuple(x if cast else x for",
          "tests/strategies/test_autograd.py"),
    Plant("compiled: the window left out", "seqpar/compiled.py",
          "Mask(causal, window, documents)", "Mask(causal, None, documents)", COMPILE),
    Plant("compiled: the keys' layout left out", "seqpar/compiled.py",
          "        keys,\n        invariant,", "        None,\n        invariant,", COMPILE),
    Plant("compiled: the seed left out", "seqpar/compiled.py",
          "Dropout(p, seed) if p else None", "Dropout(p, 0) if p else None", COMPILE),
    Plant("compiled: calls in any order", "seqpar/compiled.py",
          "    _op.register_effect(EffectType.ORDERED)", "    _op.register_effect(None)", COMPILE),
    Plant("compiled: kept once more by a tape around it", "seqpar/compiled.py",
          "return list(once(step))", "return list(step())", COMPILE),
    Plant("compiled: a gradient of lse nobody asked for", "seqpar/compiled.py",
          "ctx.num_learning = 1 + with_lse", "ctx.num_learning = num_results", COMPILE),
    Plant("compiled checkpointing keeps nothing", "seqpar/checkpointing.py",
          "create_selective_checkpoint_contexts([torch.ops.seqpar.sharded_attention.default])",
          "create_selective_checkpoint_contexts([])", COMPILE),
]  # fmt: skip


def planted(plant: Plant, folder: Path) -> None:
    """Copies the sources to `folder` and plants the bug there."""
    for part in ("seqpar", "kernels", "tests", "scripts", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / part
        ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / part, **({"ignore": ignore} if source.is_dir() else {}))
    path = folder / plant.file
    text = path.read_text()
    if text.count(plant.old) != 1:
        raise SystemExit(f"plant {plant.name!r}: {plant.file} must hold its text once")
    path.write_text(text.replace(plant.old, plant.new))


def run(command: list[str], folder: Path) -> tuple[bool, str]:
    """Whether the command failed in the copy, or did not end, and what it printed."""
    paths = os.pathsep.join([str(folder), str(folder / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "quick"}
    process = subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        text, _ = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # which torchrun passes on to its ranks
        process.communicate()
        return True, "FAILED did not end"
    return process.returncode != 0, text


def noticed(plant: Plant) -> tuple[str, str]:
    """(first failing test or "-", first failing line of check_equivalence or "-")."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted(plant, folder)
        failed, text = run([sys.executable, "-m", "pytest", "-xq", "--tb=no", plant.test], folder)
        lines = [x for x in text.splitlines() if x.startswith(("FAILED", "ERROR"))]
        name = lines[0].split(maxsplit=1)[1].split(" - ")[0] if lines else f"{plant.test} crashed"
        by_test = name if failed else "-"
        if plant.file in NOT_CHECKED or "triton" in plant.file:
            return by_test, "-"
        check = [*torchrun, "scripts/check_equivalence.py", "--dtype", "float64"]
        failed, text = run(check, folder)
        lines = [x for x in text.splitlines() if x.startswith("FAILED")]
        by_check = "-" if not failed else lines[0].removeprefix("FAILED ") if lines else "crashed"
    return by_test, by_check


def main() -> None:
    """Plants every bug in turn and prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="names of plants")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    args = parser.parse_args()
    plants = [p for p in PLANTS if not args.only or p.name in args.only]
    table = (
        "| bug | planted in | first test to fail | first line of `check_equivalence.py`, P = 3 |\n"
    )
    table += "|---|---|---|---|\n"
    print(table, end="", flush=True)
    unnoticed = []
    for plant in track(plants, description="plants", console=Console(stderr=True)):
        by_test, by_check = noticed(plant)
        row = f"| {plant.name} | `{plant.file}` | `{by_test}` | {by_check[:100]} |\n"
        print(row, end="", flush=True)
        table += row
        if by_test == "-":
            unnoticed.append(plant.name)
    if args.markdown:
        args.markdown.write_text(table)
    if unnoticed:
        raise SystemExit(f"not noticed by its test: {', '.join(unnoticed)}")


if __name__ == "__main__":
    main()
