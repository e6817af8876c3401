"""`agreed` blocks in `agreed` blocks: every rank hears of an error once along each axis, and nobody waits.

A failure here leaves a rank that tells an error to ranks that have gone, since they had heard it.
"""

import pytest

from seqpar import DesyncError, simulate
from seqpar.comm import agree, agreed


def ended(group, act):
    """What `act` raises, how many operations were agreed on by then, and that the next one is agreed on."""
    try:
        act()
        text = "nothing"
    except (ValueError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    number = group.calls.number
    agree(group, {"operation": "the next"})
    return text, number


def check(results, at_fault, number=None):
    for rank, (text, count) in enumerate(results):
        assert text.startswith("ValueError" if rank in at_fault else "DesyncError"), (rank, text)
        assert "too long" in text
        assert number in (None, count)


@pytest.mark.parametrize("at_fault", [(1,), (0, 2), (0, 1, 2)])
def test_what_an_inner_block_has_told_is_not_told_again(at_fault):
    def fn(group):
        def act():
            with agreed(group, operation="outer"), agreed(group, operation="inner"):
                if group.rank in at_fault:
                    raise ValueError("too long")

        return ended(group, act)

    check(simulate(3, fn), at_fault, number=1)


@pytest.mark.parametrize("at_fault", [(1,), (0, 2), (0, 1, 2)])
def test_what_is_raised_anew_has_been_told(at_fault):
    """Also where it is not said what it was raised from."""

    def fn(group):
        def act():
            with agreed(group, operation="outer"):
                try:
                    with agreed(group, operation="inner"):
                        if group.rank in at_fault:
                            raise ValueError("too long")
                except (ValueError, DesyncError) as error:
                    raise type(error)(f"again: {error}")  # noqa: B904

        return ended(group, act)

    check(simulate(3, fn), at_fault, number=1)


@pytest.mark.parametrize("at_fault", [(1,), (0, 2), (0, 1, 2)])
def test_what_is_raised_beside_an_inner_block_is_heard_in_it(at_fault):
    """The others are in the block that the rank at fault has not come to, or was in before."""

    def fn(group):
        def act():
            with agreed(group, operation="outer"):
                with agreed(group, operation="first"):
                    pass
                if group.rank in at_fault:
                    raise ValueError("too long")
                with agreed(group, operation="second"):
                    pass

        return ended(group, act)

    check(simulate(3, fn), at_fault, number=2)


@pytest.mark.parametrize("at_fault", range(4))
@pytest.mark.parametrize("where", ["inside", "beside"])
def test_what_one_axis_has_heard_the_others_are_told(at_fault, where):
    """The inner block is over one row of a grid, the outer one over rows, then all ranks."""

    def fn(group):
        row = group.grid(ulysses=2).ulysses

        def act():
            with agreed(row, group, operation="outer"):
                if group.rank == at_fault and where == "beside":
                    raise ValueError("too long")
                with agreed(row, operation="inner"):
                    if group.rank == at_fault:
                        raise ValueError("too long")

        return ended(group, act)

    check(simulate(4, fn), (at_fault,), number=1)


def test_all_ranks_of_a_wider_axis_have_heard_it_along_a_narrower_one():
    def fn(group):
        row = group.grid(ulysses=2).ulysses

        def act():
            with agreed(row, operation="outer"), agreed(group, operation="inner"):
                if group.rank == 2:
                    raise ValueError("too long")

        return *ended(group, act), row.calls.number

    results = simulate(4, fn)
    check([result[:2] for result in results], (2,), number=1)
    assert [result[2] for result in results] == [0] * 4


def test_an_error_that_says_what_caused_it_is_not_told_again():
    def fn(group):
        def inner():
            try:
                with agreed(group, operation="inner"):
                    if group.rank == 0:
                        raise ValueError("too long")
            except ValueError as error:
                raise ValueError("a batch is too long") from error

        def act():
            with agreed(group, operation="outer"):
                inner()

        return ended(group, act)

    results = simulate(3, fn)
    check(results, (0,), number=1)
    assert results[0][0] == "ValueError: a batch is too long"


def test_an_error_after_one_that_was_dealt_with_is_told():
    def fn(group):
        def act():
            with agreed(group, operation="outer"):
                try:
                    with agreed(group, operation="inner"):
                        raise ValueError("on every rank")
                except ValueError:
                    pass
                if group.rank == 1:
                    raise ValueError("too long")

        return ended(group, act)

    check(simulate(3, fn), (1,), number=2)


def test_an_error_of_the_wire_is_not_told_on_it():
    """It is raised as it came, and says which rank it is about."""

    def caught(group):
        try:
            with agreed(group, operation="outer"):
                raise DesyncError("the connection is closed")
        finally:
            assert group.calls.number == 0

    with pytest.raises(DesyncError, match="the connection is closed"):
        simulate(2, caught)


def test_an_error_that_nobody_can_be_told_is_still_the_one_that_is_raised():
    def fn(group):
        if group.rank == 1:
            with agreed(group, operation="outer"):
                raise ValueError("too long")

    with pytest.raises(ValueError, match="too long") as caught:
        simulate(2, fn)
    assert "the other ranks could not be told: " in "".join(caught.value.__notes__)
