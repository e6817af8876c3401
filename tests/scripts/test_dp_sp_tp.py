"""The 3-D recipe: dp x sp x tp gives the losses and gradient norms of one process."""

import dp_sp_tp
import pytest
import torch
from byte_lm.text import load_text

import seqpar

SMALL = ["--steps", "3", "--length", "41", "--dim", "24", "--heads", "3", "--layers", "1"]
SMALL += ["--dtype", "float64", "--clip", "0.5"]
TEXT = torch.arange(3000).mul(7919).remainder(251).to(torch.uint8)


def train(group, *options):
    args = dp_sp_tp.parser().parse_args([*SMALL, *options])
    mesh = dp_sp_tp.Mesh.of(args, "cpu")
    assert mesh.sp.size * mesh.tp.size * args.dp == group.size
    return dp_sp_tp.train(args, mesh, TEXT)


def test_dp_x_sp_x_tp_equals_one_process(eight_processes):
    want = train(seqpar.Group.alone())
    for losses, norms in eight_processes.run(train, "--dp", "2", "--tp", "2", timeout=240):
        assert losses == pytest.approx(want[0], rel=1e-11)
        assert norms == pytest.approx(want[1], rel=1e-11)
    assert want[0][2] < want[0][0]
    assert max(want[1]) > 0.5  # so that some step was clipped


def test_ranks_that_are_no_mesh_are_refused():
    args = dp_sp_tp.parser().parse_args(["--dp", "2"])
    with pytest.raises(ValueError, match=r"1 ranks must divide by dp \* tp = 2 \* 1"):
        dp_sp_tp.Mesh.of(args, "cpu")


def test_the_text_is_that_of_the_other_recipe():
    assert dp_sp_tp.load_text is load_text
