"""The pictures of the README are what the code draws, and the code draws what the package does."""

import sys
from pathlib import Path

import modules
import pytest
from module_pictures.ring_picture import meetings

from seqpar.layout import LAYOUTS, Mask

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


def test_the_committed_pictures_are_those_that_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["modules.py", "--out", str(tmp_path)])
    modules.main()
    drawn = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert drawn.keys() == {"ulysses.svg", "ring.svg"}
    for name, svg in drawn.items():
        assert svg == (PICTURES / name).read_text("utf-8"), name


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("size", "length"), [(1, 5), (3, 12), (4, 13)])
def test_over_the_steps_of_the_ring_every_visible_score_is_drawn_once_by_its_rank(
    kind, size, length
):
    layout = LAYOUTS[kind](length, size)
    drawn = []
    for meeting in meetings(layout, Mask(causal=True)):
        mine = layout.positions(meeting.rank).tolist()
        theirs = layout.positions(meeting.owner).tolist()
        for row, keys in meeting.seen(layout):
            assert row in mine
            assert set(keys) <= set(theirs)
            drawn += [(row, key) for key in keys]
    assert sorted(drawn) == [(row, key) for row in range(length) for key in range(row + 1)]
