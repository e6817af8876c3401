"""Shape checks on, one thread per rank, the same examples on every run in CI, one world of processes."""

import os
from contextlib import ExitStack, closing
from importlib.util import find_spec

os.environ["SEQPAR_CHECK_SHAPES"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["SEQPAR_PROFILES"] = os.devnull  # whatever its user measured on this machine

import pytest
import torch
from torch._subclasses import FakeTensorMode

if not torch.cuda.is_available():  # Triton kernels then run in Python; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

if torch.backends.cuda.is_built() and not torch.cuda.is_available():
    # Without a GPU, a CUDA build of torch 2.11 crashes where threads went backward before this first time.
    with FakeTensorMode():
        pass

from hypothesis import Phase, settings

from seqpar.testing import ProcessWorld
from seqpar_kernels import choose, refusal
from seqpar_kernels.profile import forget

torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
settings.register_profile("dev", deadline=None, max_examples=60, print_blob=True)
settings.register_profile(
    "quick", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


# What most processes would import by themselves, which takes each of them seconds.
PRELOAD = ["torch.distributed.tensor.parallel", "torch.distributed.fsdp"]
PRELOAD += ["transformers.modeling_utils", "transformers.models.bloom.modeling_bloom"]
PRELOAD += ["peft", "seqpar.integrations.trainer", "seqpar.integrations.lightning"]


class World:
    """A world of gloo processes that is rebuilt after a failure."""

    def __init__(self, size):
        self._size, self._world = size, None

    def run(self, fn, *args, size=None, timeout=120.0):
        if self._world is None or not self._world.is_alive:
            self._world = ProcessWorld(self._size, preload=PRELOAD)
        return self._world.run(fn, *args, size=size, timeout=timeout)

    def close(self):
        if self._world is not None and self._world.is_alive:
            self._world.close()


class Worlds(World):
    """A world of 8 that serves any smaller size."""

    def run(self, size, fn, *args, timeout=60.0):
        return super().run(fn, *args, size=size, timeout=timeout)


@pytest.fixture(scope="session")
def worlds():
    worlds = Worlds(8)
    yield worlds
    worlds.close()


@pytest.fixture
def unused_processes():
    """Makes a world of exactly so many, which nothing has used before."""
    with ExitStack() as stack:
        yield lambda size: stack.enter_context(closing(World(size)))


@pytest.fixture
def eight_processes(unused_processes):
    """Exactly eight, which nothing has used before."""
    return unused_processes(8)


@pytest.fixture(scope="session")
def four_processes():
    """Exactly four, for what makes a device mesh of all processes."""
    world = World(4)
    yield world
    world.close()


@pytest.fixture(autouse=True)
def nothing_chosen_yet():
    """What computes is remembered, also what a test that changes the machine made of it."""
    forget_choices()
    yield
    forget_choices()


@pytest.fixture(scope="module")
def products_in_order():
    """Triton's interpreter adds products in the order of their terms; a GPU's own products are as they are.

    It multiplies by numpy, whose library adds in another order on other machines and in other rows of a
    matrix: on AMD's CPUs the bits of a row depended on where in its tile it was.
    """
    if torch.cuda.is_available() or find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    def create_dot(_builder, a, b, d, *_):
        terms = a.data[:, :, None] * b.data[None].astype(d.data.dtype)
        return interpreter.TensorHandle(terms.sum(1) + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


def forget_choices():
    choose.cache_clear()
    refusal.cache_clear()
    forget()


def pytest_runtest_logreport(report):
    """Tells a failure when it happens, where there is a GPU: a day on one may end before the summary."""
    if torch.cuda.is_available() and report.failed and not os.environ.get("PYTEST_XDIST_WORKER"):
        print(f"\nFAILED {report.nodeid}\n{str(report.longrepr)[-1500:]}", flush=True)
