"""The planted bugs can be planted: a line that changes takes its plant along."""

import pytest
from plant_bugs import PLANTS, ROOT


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_the_line_is_there_once_and_the_test_is_there(plant):
    assert (ROOT / plant.file).read_text("utf-8").count(plant.old) == 1
    assert plant.new != plant.old
    assert (ROOT / plant.test).exists()
