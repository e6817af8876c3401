"""Agreement: what one rank would refuse, all refuse, before the first message that could hang."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from seqpar.comm.group import Group

_REFUSED = 0  # the digest of a rank that has an error of its own


class DesyncError(RuntimeError):
    """Ranks of a group differ in what they are about to do, or one of them refused to do it."""


def agree(group: Group, claim: Mapping[str, object], error: Exception | None = None) -> None:
    """Returns if every rank makes the same claim and none has an error. All ranks must call.

    Costs one message of 8 bytes to every other rank; only a disagreement sends the claims themselves.

    Args:
        claim: what the ranks must have in common; values are compared by their `repr`.
        error: why this rank cannot go on. It is raised here, and a DesyncError quotes it elsewhere.

    Raises:
        DesyncError: ranks differ, or another rank has an error. Raised on every rank without one.
    """
    if group.size > 1:
        text = {name: repr(value) for name, value in claim.items()}
        digests = _gather_digests(group, _REFUSED if error else _digest(text))
        if _REFUSED not in digests and len(set(digests)) == 1:
            return
        refusal = f"{type(error).__name__}: {error}" if error else None
        everyone = group.transport.gather_objects((text, refusal))
        if error is None:
            raise DesyncError(_explain(cast("list[tuple[dict[str, str], str | None]]", everyone)))
    if error is not None:
        raise error


def _digest(text: Mapping[str, str]) -> int:
    """63 bits of a hash, never the one that means refusal."""
    raw = hashlib.blake2b(repr(sorted(text.items())).encode(), digest_size=8).digest()
    return (int.from_bytes(raw, "little") >> 1) | 1


def _gather_digests(group: Group, digest: int) -> list[int]:
    device = group.transport.control_device
    digests = torch.empty(group.size, dtype=torch.long, device=device)
    mine = torch.tensor([digest], dtype=torch.long, device=device)
    digests[group.rank] = digest
    others = [r for r in range(group.size) if r != group.rank]
    group.exchange(
        "agree", [(r, mine) for r in others], [(r, digests[r : r + 1]) for r in others]
    ).wait()
    return digests.tolist()


def _explain(everyone: list[tuple[dict[str, str], str | None]]) -> str:
    """Who refused and why; else which claims differ, and who makes which."""
    refusals = [f"rank {r}: {refusal}" for r, (_, refusal) in enumerate(everyone) if refusal]
    if refusals:
        return "refused on every rank because of " + "; ".join(refusals)
    differences = []
    for name in dict.fromkeys(name for text, _ in everyone for name in text):
        holders: dict[str, list[int]] = defaultdict(list)
        for rank, (text, _) in enumerate(everyone):
            holders[text.get(name, "nothing")].append(rank)
        if len(holders) > 1:
            values = ", ".join(f"{v} on {_ranks(ranks)}" for v, ranks in holders.items())
            differences.append(f"{name} is {values}")
    return "ranks disagree: " + "; ".join(differences) + ". Give every rank the same call"


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
