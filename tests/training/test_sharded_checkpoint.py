"""Runs that FSDP shards: the losses of one rank, and checkpoints for any ranks with FSDP or without."""

import pytest
import torch
from byte_lm.loop import train
from byte_lm.recipe import Recipe

import seqpar

TEXT = torch.arange(4000).mul(7919).remainder(251).to(torch.uint8)
SMALL = {"length": 37, "batch": 2, "dim": 36, "heads": 6, "layers": 2, "warmup": 2}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def run(group, options, folder, fsdp, resume):
    found = []
    train(
        group, Recipe(**(SMALL | options)), TEXT,
        checkpoint=folder, fsdp=fsdp, resume=resume, on_step=found.append,
    )  # fmt: skip
    return [(record.loss, record.grad_norm) for record in found]


def close(found, expected):
    for got in found:
        torch.testing.assert_close(
            torch.tensor(got), torch.tensor(expected), rtol=2e-6, atol=0, check_dtype=False
        )


def test_sharded_and_replicated_runs_resume_each_other(four_processes, tmp_path):
    (one,) = seqpar.simulate(1, run, {"steps": 6}, None, False, False)
    options = {"steps": 2, "dp": 2, "checkpointing": "full", "loss_tile": 8}
    close(four_processes.run(run, options, tmp_path, True, False), one[:2])
    files = len(list((tmp_path / "step-000002").glob("*.distcp")))
    assert files == 4, "every rank has written its own part"
    close(seqpar.simulate(3, run, {"steps": 4}, tmp_path, False, True), one[2:4])
    options = {"steps": 6, "strategy": "hybrid", "accumulate": 2}
    close(four_processes.run(run, options, tmp_path, True, True), one[4:])
    assert [p.name for p in tmp_path.iterdir()] == ["step-000006"]


def refuse_to_write(group, folder):
    """Rank 2 cannot write; every rank must say so, and none wait."""
    from byte_lm import checkpoint

    original = checkpoint.dcp.FileSystemWriter.write_data

    def write_data(*args, **options):
        if group.rank == 2:
            raise OSError("no space left")
        return original(*args, **options)

    checkpoint.dcp.FileSystemWriter.write_data = write_data
    try:
        run(group, {"steps": 1}, folder, True, False)
    except OSError as error:
        return "no space left" in str(error)
    finally:
        checkpoint.dcp.FileSystemWriter.write_data = original


def test_a_rank_that_cannot_write_is_an_error_on_every_rank(four_processes, tmp_path):
    assert four_processes.run(refuse_to_write, tmp_path) == [True] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001.partial"]
