"""Shape checks on, one thread per rank, the same examples on every run in CI, one world of processes."""

import os

os.environ["SEQPAR_CHECK_SHAPES"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # Triton kernels then run in Python; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import Phase, settings

from seqpar.testing import ProcessWorld

torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
settings.register_profile("dev", deadline=None, max_examples=60, print_blob=True)
settings.register_profile(
    "quick", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


class Worlds:
    """A world of 8 gloo processes that serves any smaller size, and is rebuilt after a failure."""

    def __init__(self):
        self._world = None

    def run(self, size, fn, *args, timeout=60.0):
        if self._world is None or not self._world.is_alive:
            self._world = ProcessWorld(8)
        return self._world.run(fn, *args, size=size, timeout=timeout)

    def close(self):
        if self._world is not None and self._world.is_alive:
            self._world.close()


@pytest.fixture(scope="session")
def worlds():
    worlds = Worlds()
    yield worlds
    worlds.close()
