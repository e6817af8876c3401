"""Four processes, which FSDP and DDP can take as their world."""

import pytest

from seqpar.testing import ProcessWorld


@pytest.fixture(scope="session")
def four():
    with ProcessWorld(4) as world:
        yield world
