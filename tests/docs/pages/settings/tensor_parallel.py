"""What the blocks of docs/tensor-parallel.md need."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPTNeoXConfig, GPTNeoXModel

import seqpar
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.tensor_parallel import apply_policy, megatron
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import batch_of


def layer():
    config = GPTNeoXConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=8)
    torch.manual_seed(0)
    layout = seqpar.zigzag(13, 2)
    sp = torch.distributed.get_rank() // 2
    x = torch.randn(1, 13, 64)[:, layout.positions(sp)]
    names = {"sp": 2, "tp": 2, "gpt_neox": GPTNeoXModel(config), "x": x, "layout": layout}
    yield names
    assert names["y"].shape == x.shape
    assert names["y"].isfinite().all()


def whole_model():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "tp"))
    names = {"mesh": mesh, "tp": seqpar.Group.of(mesh["tp"]), "model": FUSED["gpt_neox"].make()}
    yield names | {"batch": batch_of(2, 13)}


def three_axes():
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "sp", "tp"))
    model, tp = FUSED["gpt_neox"].make(), seqpar.Group.of(mesh["tp"])
    replace_attention(model, tp=tp)
    apply_policy(model, megatron(model), mesh["tp"])
    ring = seqpar.RingAttention(seqpar.Group.of(mesh["sp"]))
    names = {"sequence_parallel": SequenceParallel(model, ring, tp=tp), "model": model}
    names |= {"dp": 2, "sp": 1, "tp": 2, "batches": [batch_of(2, 13), batch_of(2, 11)]}
    yield names
    assert names["loss"].isfinite()
