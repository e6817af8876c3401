"""What the blocks of README.md need."""

import copy
from contextlib import redirect_stdout
from io import StringIO

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import seqpar
from pages.blocks import blocks_of
from pages.models import AttentionModel, saved
from seqpar.integrations.transformers import SequenceParallel
from seqpar.testing.models.tiny import FAMILIES, batch_of


def first_example():
    printed = yield {}
    assert float(printed[0].removeprefix("largest difference:")) < 1e-12


def training():
    """The block's claim: loss and gradients are what one device has."""
    model = AttentionModel()
    whole, ids = copy.deepcopy(model), torch.randint(16, (2, 13))
    names = {"model": model, "ids": ids, "group": seqpar.Group.of()}
    yield names
    alone = seqpar.contiguous(13, 1)
    logits = whole(ids, torch.arange(13).expand(2, -1), alone, seqpar.Group.alone())
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(names["loss"], loss)
    for got, want in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def five_lines():
    """Losses are those of the script that the lines change (off by 1.1e-7, without the last line 1.6e-3)."""
    (diff,) = (block for block in blocks_of("README.md") if block.language == "diff")
    assert sum(line.startswith("+") for line in diff.text.splitlines()) == 5
    with saved(FAMILIES["llama"].make(torch.float32)) as path:
        given = {"path": path, "batches": [batch_of(2, length) for length in (31, 18, 25, 31)]}
        (got,) = yield dict(given)
        with redirect_stdout(StringIO()) as want:
            exec(diff.side("-"), dict(given))
    losses = [torch.tensor([float(x) for x in text.split()]) for text in (got, want.getvalue())]
    assert len(losses[0]) == 4
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0.0)


def tensor_parallel():
    """The import of the block above it is the reader's."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "tp"))
    names = {"model": FAMILIES["llama"].make(), "mesh": mesh, "SequenceParallel": SequenceParallel}
    yield names
    assert names["sp"].loss(batch_of(2, 13)).isfinite()


def modules():
    group = seqpar.Group.of()
    layout, memory_layout = seqpar.zigzag(13, group.size), seqpar.contiguous(7, group.size)
    q = torch.randn(1, layout.rows[group.rank], 4, 8)
    k, v = torch.randn(2, 1, memory_layout.rows[group.rank], 4, 8)
    names = {"group": group, "mask": seqpar.Mask(causal=True), "layout": layout, "q": q}
    names |= {"memory_layout": memory_layout, "memory_k": k, "memory_v": v}
    yield names
    assert names["out"].shape == q.shape


def layers():
    group = seqpar.Group.of()
    layout, memory_layout = seqpar.zigzag(13, group.size), seqpar.contiguous(7, group.size)
    x, memory = (torch.randn(1, y.rows[group.rank], 512) for y in (layout, memory_layout))
    k, v = torch.randn(2, 1, layout.rows[group.rank], 2, 8)
    torch.manual_seed(0)  # a new token is the same on all ranks
    names = {"group": group, "layout": layout, "memory_layout": memory_layout, "x": x}
    names |= {"memory": memory, "k": k, "v": v, "q": torch.randn(1, 1, 4, 8)}
    yield names | dict(zip(("k_new", "v_new"), torch.randn(2, 1, 1, 2, 8), strict=True))


def score_terms():
    yield {"group": seqpar.Group.of(), "slopes": torch.rand(4), "sinks": torch.rand(4), "step": 3}
