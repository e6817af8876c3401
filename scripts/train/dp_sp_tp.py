"""Trains a model of transformers on a dp x sp x tp mesh, for the losses of one process.

Replicas have sequences of their own, sp ranks share each sequence, tp ranks the heads, the MLPs and the
vocabulary. The model is a small GPT-NeoX (q, k and v in one weight), drawn from a seed, on bytes of Python's
standard library. A template: with weights of your own, replace `make_model`.

Example: torchrun --nproc-per-node 8 scripts/train/dp_sp_tp.py --dp 2 --tp 2 --steps 20 --json out.json
"""

from __future__ import annotations

import argparse
import gc
import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from byte_lm.recipe import Recipe
from byte_lm.start import start
from byte_lm.text import batch_at, load_text, standard_library
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

import seqpar
from seqpar import Group
from seqpar.commands import progress
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.tensor_parallel import apply_policy, clip_gradients, megatron

AXES = ("dp", "sp", "tp")
STRATEGIES = {
    "ring": seqpar.RingAttention,
    "ulysses": seqpar.UlyssesAttention,
    "allgather": seqpar.AllGatherAttention,
}


def make_model(args: argparse.Namespace) -> PreTrainedModel:
    """The same on every rank."""
    torch.manual_seed(args.seed)
    config = GPTNeoXConfig(
        vocab_size=256, hidden_size=args.dim, intermediate_size=4 * args.dim,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, hidden_dropout=0.0,
        max_position_embeddings=args.length, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).to(getattr(torch, args.dtype)).train()


@dataclass(frozen=True)
class Mesh:
    """Who this rank works with along which axis.

    Args:
        replica: which one this rank is of.
        sp, tp: the ranks that share its sequences, and its weights.
        everyone: the ranks that hold the same shards: all of dp x sp.
    """

    replica: int
    sp: Group
    tp: Group
    everyone: Group
    tp_mesh: DeviceMesh | None

    @staticmethod
    def of(args: argparse.Namespace, device: str) -> Mesh:
        """The mesh that the arguments ask for; makes its process groups.

        Raises:
            ValueError: there are not dp x sp x tp ranks, or the batch does not divide by dp.
        """
        size = dist.get_world_size() if dist.is_initialized() else 1
        if size % (args.dp * args.tp) or args.batch % args.dp:
            raise ValueError(
                f"{size} ranks must divide by dp * tp = {args.dp} * {args.tp}, and the batch of "
                f"{args.batch} by dp"
            )
        if size == 1:
            alone = Group.alone()
            return Mesh(0, alone, alone, alone, None)
        mesh = init_device_mesh(
            device, (args.dp, size // (args.dp * args.tp), args.tp), mesh_dim_names=AXES
        )
        everyone = Group.of(mesh["dp", "sp"]._flatten("dp_sp"))
        sp, tp = Group.of(mesh["sp"]), Group.of(mesh["tp"])
        return Mesh(mesh["dp"].get_local_rank(), sp, tp, everyone, mesh["tp"])


def train(
    args: argparse.Namespace, mesh: Mesh, text: torch.Tensor
) -> tuple[list[float], list[float]]:
    """(losses, norms of the gradient) of every step, the same on every rank."""
    model = make_model(args).to(text.device)
    if mesh.tp_mesh is not None:
        replace_attention(model, tp=mesh.tp)
        apply_policy(model, megatron(model), mesh.tp_mesh)
    sp = SequenceParallel(model, STRATEGIES[args.strategy](mesh.sp))
    # Shards of torch's styles are DTensors and those of attention are not: one at a time.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-6, foreach=False)
    recipe = Recipe(length=args.length, batch=args.batch, seed=args.seed)
    losses, norms = [], []
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    with progress.steps("training", args.steps, shown=is_first) as told:
        for step in range(args.steps):
            batch = batch_at(text, recipe, step)
            mine = {name: x.chunk(args.dp)[mesh.replica] for name, x in batch.items()}
            loss = sp.loss(mine, everyone=mesh.everyone)
            sp.backward(loss, everyone=mesh.everyone)
            norms.append(clip_gradients(model, mesh.tp, args.clip))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            told.done(f"loss {losses[-1]:.4f}, gradient norm {norms[-1]:.3g}")
    return losses, norms


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers: dict[str, tuple[Any, str]] = {
        "dp": (1, "replicas"),
        "tp": (1, "ranks that share the weights; the others of a replica share sequences"),
        "steps": (20, "in all"),
        "length": (512, "bytes of a sequence"),
        "batch": (2, "sequences of a step, of all replicas"),
        "dim": (96, "model width"),
        "layers": (2, "number of layers"),
        "heads": (6, "attention heads"),
        "lr": (1e-3, "learning rate"),
        "clip": (1.0, "largest norm of the gradient"),
        "seed": (0, "of weights and batches"),
    }
    for name, (default, meaning) in numbers.items():
        options.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{meaning} (default: {default})"
        )
    options.add_argument("--strategy", choices=STRATEGIES, default="ring")
    options.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options.add_argument("--json", type=Path, help="write losses and gradient norms here")
    return options


def main() -> None:
    """Trains, prints the losses, and writes them on rank 0."""
    args = parser().parse_args()
    try:
        group, device = start()
        text = load_text(standard_library(), 1_000_000).to(device)
        losses, norms = train(args, Mesh.of(args, device.type), text)
        if group.rank == 0:
            print(f"{args.steps} steps, loss {losses[0]:.6f} -> {losses[-1]:.6f}")
            if args.json:
                args.json.write_text(json.dumps({"losses": losses, "norms": norms}, indent=1))
    except (ValueError, NotImplementedError, OSError, seqpar.DesyncError) as error:
        traceback.clear_frames(error.__traceback__)
        raise SystemExit(f"error: {error}") from error
    finally:
        gc.collect()  # cycles hold process groups, whose threads may abort Python's exit
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
