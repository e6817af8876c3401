"""What torch does not document is there; where it is not, a sentence says so and the rest still works."""

import subprocess
import sys

import pytest
import torch

from seqpar_kernels import Request, choose, refusal, torch_internals
from seqpar_kernels.torch_internals import PARTS, attention_ops, missing, parts

ON_CPU = Request(torch.device("cpu"), torch.float32, 8, 8)


@pytest.mark.parametrize("use", PARTS)
def test_this_torch_has_every_part(use):
    assert missing(use) is None
    assert len(parts(use)) == len(PARTS[use])


@pytest.fixture
def without(monkeypatch):
    """A torch without a part."""

    def lacking(use):
        monkeypatch.setitem(PARTS, use, (*PARTS[use], "_C._no_such_part"))
        forget()

    yield lacking
    monkeypatch.undo()
    forget()


def forget():
    parts.cache_clear()
    missing.cache_clear()
    choose.cache_clear()
    refusal.cache_clear()


def test_an_attention_that_is_not_there_is_passed_over_and_says_why(without):
    assert choose(ON_CPU) == "aten"
    without(torch_internals.CPU_FLASH)
    assert choose(ON_CPU) == "reference"
    text = rf"needs torch\._C\._no_such_part, which torch {torch.__version__[:4]}.* does not have; tested"
    with pytest.raises(NotImplementedError, match=f"'aten' cannot be served: .*{text}"):
        choose(ON_CPU, "aten")
    with pytest.raises(NotImplementedError, match=text):
        attention_ops(torch_internals.CPU_FLASH)[0](1, 2)


CODE = """
import torch

del torch.library._register_effectful_op
import seqpar

x = torch.randn(1, 6, 2, 4, requires_grad=True)
plan = seqpar.Plan(seqpar.Group.alone(), seqpar.zigzag(6, 1), seqpar.Mask(causal=True))


def called(x):
    return seqpar.attention(x, x, x, plan)


called(x).sum().backward()
try:
    torch.compile(called, backend="eager", fullgraph=True)(x)
except Exception as error:
    print(error)
"""


def test_a_torch_without_a_part_imports_and_attends_and_refuses_to_compile():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = "attention in compiled code needs torch.library._register_effectful_op, which torch"
    assert text in done.stdout
