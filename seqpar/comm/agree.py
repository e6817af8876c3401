"""Agreement: what one rank would refuse, all refuse, before the first message that could hang."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from seqpar.comm.group import Group

SHOWN = 8  # differences between claims, in a message
_REFUSED = 0  # the digest of a rank that has an error of its own
# Of an error: the ranks, of each group, that all left what they did with it.
_HEARD = "seqpar_heard_by"


class DesyncError(RuntimeError):
    """Ranks of a group differ in what they are about to do, or one of them refused to do it."""


@contextmanager
def agreed(*axes: Group, operation: str) -> Iterator[dict[str, object]]:
    """A block of checks after which all ranks go on, or none does. All ranks must enter.

    What the block puts into the dict that it is given must be the same on all ranks, compared by
    `repr`. If the block raises, the error is raised here, and quoted by a DesyncError elsewhere. Blocks may
    hold others: an error that all ranks of an axis have heard already is not told along it again.

    Args:
        axes: the groups of this rank, one for each axis of a mesh. The ranks agree along each in turn:
            what one refuses is heard along the first axis, and by all ranks of the mesh along the last.
        operation: what the ranks are about to do.

    Raises:
        DesyncError: ranks differ, or another rank raised. Raised on every rank that did not.
        TypeError: an axis is no group.
    """
    for axis in axes:
        if not hasattr(axis, "transport"):  # there is nobody to agree with
            raise TypeError(
                f"{operation} takes a seqpar.Group, such as attend.group or seqpar.Group.of(mesh['sp']), "
                f"got {axis!r}"
            )
    claim: dict[str, object] = {"operation": operation}
    try:
        yield claim
    except Exception as error:
        # docs/design.md: `agreed` is a `with` block
        try:
            _tell(axes, claim, error)
        except DesyncError as lost:  # there is nobody to hear it, or no wire
            error.add_note(f"the other ranks could not be told: {lost}")
        raise
    _agree_along(axes, claim)


def _agree_along(
    axes: Sequence[Group], claim: Mapping[str, object], refusal: str | None = None
) -> None:
    """Agrees along one axis after another; a refusal along one is a refusal along those that follow."""
    for place, axis in enumerate(axes):
        try:
            agree(axis, claim, refusal)
        except DesyncError as error:
            # The others wait along the axes that are left. Each is told, and this error is raised.
            _tell(axes[place + 1 :], claim, error)
            raise


def _tell(axes: Sequence[Group], claim: Mapping[str, object], error: Exception) -> None:
    """Tells ranks of an error along each axis, but for those whose ranks have all heard it."""
    cause: BaseException | None = error
    while cause is not None and not hasattr(cause, _HEARD):
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if cause is None and isinstance(error, DesyncError):
        return  # the wire's, on which nothing more can be sent
    heard = getattr(cause, _HEARD, ())
    deaf = [axis for axis in axes if not any(_ranks(axis) <= ranks for ranks in heard)]
    _agree_along(deaf, claim, f"{type(error).__name__}: {error}")
    setattr(error, _HEARD, [*heard, *map(_ranks, deaf)])


def _ranks(axis: Group) -> frozenset[int]:
    return frozenset(axis.transport.global_ranks)


def agree(group: Group, claim: Mapping[str, object], refusal: str | None = None) -> None:
    """Compares the claims of all ranks, and returns if they are the same or this rank refuses. All must call.

    Costs one all-reduce of 16 bytes; only a disagreement sends the claims themselves.

    Args:
        claim: what the ranks must have in common; values are compared by their `repr`.
        refusal: why this rank cannot go on; its caller raises the error that the others quote.

    Raises:
        DesyncError: ranks differ, or another rank refuses.
    """
    if group.size == 1:
        return
    group.calls.number += 1
    group.calls.name = str(claim.get("operation", ""))
    text = {name: repr(value) for name, value in claim.items()}
    text["number of the operation"] = str(group.calls.number)
    lowest, highest = _extremes(group, _digest(text) if refusal is None else _REFUSED)
    if lowest == highest != _REFUSED:
        return
    everyone = group.transport.gather_objects((text, refusal))
    # A rank that refused takes part so that the others can quote it; its caller raises its own error.
    if refusal is None:
        error = DesyncError(_explain(cast("list[tuple[dict[str, str], str | None]]", everyone)))
        setattr(error, _HEARD, [_ranks(group)])
        raise error


def _digest(text: Mapping[str, str]) -> int:
    """Hashes a claim to 63 bits, which are never those that mean refusal."""
    raw = hashlib.blake2b(repr(sorted(text.items())).encode(), digest_size=8).digest()
    # Shifted, it fits a signed 64-bit integer; the lowest bit keeps it from being `_REFUSED`.
    return (int.from_bytes(raw, "little") >> 1) | 1


def _extremes(group: Group, digest: int) -> tuple[int, int]:
    """The lowest and the highest digest of all ranks, by one all-reduce."""
    mine = torch.tensor([-digest, digest], device=group.transport.control_device)
    lowest, highest = group.largest(mine).tolist()
    return -lowest, highest


def _explain(everyone: list[tuple[dict[str, str], str | None]]) -> str:
    """Says who refused and why; else which claims differ, and who makes which."""
    refusals = [f"rank {r}: {refusal}" for r, (_, refusal) in enumerate(everyone) if refusal]
    if refusals:
        return "refused on every rank because of " + "; ".join(refusals)
    differences = []
    operations = {text.get("operation") for text, _ in everyone}
    # Ranks that are at other operations differ in all else too, which says nothing.
    names = (
        ["operation"] if len(operations) > 1 else [name for text, _ in everyone for name in text]
    )
    for name in dict.fromkeys(names):
        holders: dict[str, list[int]] = defaultdict(list)
        for rank, (text, _) in enumerate(everyone):
            holders[text.get(name, "nothing")].append(rank)
        if len(holders) > 1:
            values = ", ".join(f"{v} on {named_ranks(ranks)}" for v, ranks in holders.items())
            differences.append(f"{name} is {values}")
    if len(differences) > SHOWN:
        differences[SHOWN:] = [f"and {len(differences) - SHOWN} more"]
    here = everyone[0][0].get("operation") if len(operations) == 1 else None
    where = "" if here is None else f" in {here[1:-1]}"  # without the quotes of its `repr`
    return f"ranks disagree{where}: {'; '.join(differences)}. Give every rank the same call"


def named_ranks(ranks: Sequence[int]) -> str:
    """Ranks in words: "rank 1", "ranks 0, 2", "ranks 0-5, 9"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 3 else ", ".join(map(str, run)) for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(words)
