"""A rank that is gone, stopped or elsewhere is named by every other rank, in the time that was asked for."""

import re

import pytest

from seqpar import Group
from seqpar.testing import faults

SOON_SECONDS = 15.0  # far below what the process group would wait


@pytest.mark.parametrize("fault", faults.FAULTS)
@pytest.mark.parametrize("phase", faults.PHASES)
def test_every_other_rank_names_the_rank(phase, fault):
    for told in faults.outcome(3, "ring", phase, fault):
        assert told is not None, "still waiting"
        assert told.text.startswith("DesyncError"), told
        assert f"rank {faults.ODD}" in told.text, told
        assert told.seconds < SOON_SECONDS, told


@pytest.mark.parametrize("strategy", ["ulysses", "hybrid"])
def test_with_another_strategy(strategy):
    for told in faults.outcome(4, strategy, faults.inside_backward, faults.stopped):
        assert told is not None, "still waiting"
        assert f"rank {faults.ODD} has said nothing" in told.text, told


@pytest.mark.parametrize("strategy", ["hybrid", "mesh"])
def test_ranks_that_waited_for_another_one_name_it_too(strategy):
    """They lose a rank that gave up because of it, which says so before its connections close."""
    for told in faults.outcome(4, strategy, faults.inside_forward, faults.killed):
        assert told is not None, "still waiting"
        assert f"rank {faults.ODD}" in told.text, told


@pytest.mark.parametrize(
    "phase", [faults.before_a_call, faults.inside_forward, faults.inside_backward]
)
def test_a_rank_that_takes_its_time_is_waited_for(phase):
    """Others may be through with a call that it is still in: they have sent all that it wants of them."""
    found = faults.outcome(4, "ring", phase, faults.slow)
    assert [told and told.text for told in found] == ["nothing"] * 3
    said = rf"rank \d waits for rank {faults.ODD} in \w+ of .*attention.* among ranks 0-3, for \d s so far: "
    said += f"rank {faults.ODD} is busy with something else"
    warnings = [text for told in found for text in told.warnings]
    assert any(re.fullmatch(said, text) for text in warnings), warnings
    assert len(warnings) <= 2 * 3, "after half of the patience, and when it has taken twice as long"


def refused(_, patience):
    """What `Group.of` says of such a patience."""
    try:
        Group.of(patience=patience)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("patience", [0, 0.0, -1.0, float("nan")])
def test_no_patience_at_all_is_refused(worlds, patience):
    for text in worlds.run(2, refused, patience):
        assert text == f"patience is a number of seconds above 0, got {patience!r}"
