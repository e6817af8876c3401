"""Has one rank fail in every way, at every phase, under every strategy, and shows what the others are told.

Every rank but the faulty one must raise an error that names it. The table is that of docs/reliability.md.

Example: python scripts/check/faults.py --strategies ring ulysses --markdown faults.md
"""

from __future__ import annotations

from pathlib import Path

from seqpar.commands import progress
from seqpar.commands.arguments import parser_of
from seqpar.strategies import STRATEGIES
from seqpar.testing import faults


def cell(found: list[faults.Told | None]) -> tuple[str, bool]:
    """(the longest time until a rank was told, or what went wrong; whether all was well)."""
    for told in found:
        if told is None:
            return "hangs", False
        if not told.text.startswith("DesyncError") or f"rank {faults.ODD}" not in told.text:
            return told.text[:60], False
    return f"{max(told.seconds for told in found if told is not None):.1f}", True


def main() -> None:
    """Runs them all and prints a table in Markdown; fails where a rank was not told."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES)
    )
    phases = {phase.__name__: phase for phase in faults.PHASES}
    parser.add_argument("--phases", nargs="+", choices=list(phases), default=list(phases))
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    args = parser.parse_args()
    names = [fault.__name__ for fault in faults.FAULTS]
    lines = [f"| strategy | phase | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    well = True
    rows = [(strategy, phases[name]) for strategy in args.strategies for name in args.phases]
    for strategy, phase in progress.track(rows, "faults"):
        cells = []
        for fault in faults.FAULTS:
            text, is_well = cell(faults.outcome(args.ranks, strategy, phase, fault))
            cells.append(text)
            well &= is_well
        lines.append(f"| {strategy} | {phase.__name__.replace('_', ' ')} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")
    if not well:
        raise SystemExit("a rank was not told, see above")


if __name__ == "__main__":
    main()
