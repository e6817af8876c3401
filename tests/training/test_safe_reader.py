"""Checkpoints that somebody else has written are read without running what they say."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from byte_lm import checkpoint
from byte_lm.loop import train
from byte_lm.recipe import Recipe
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, MetadataIndex

import seqpar

TEXT = torch.arange(4000).mul(7919).remainder(251).to(torch.uint8)
SMALL = {"length": 17, "batch": 1, "dim": 12, "heads": 2, "layers": 1, "warmup": 1, "steps": 1}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Runs:
    """Touches a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.fixture
def saved(tmp_path):
    train(seqpar.Group.alone(), Recipe(**SMALL), TEXT, checkpoint=tmp_path)
    return tmp_path / "step-000001"


def resume(folder):
    recipe = Recipe(**(SMALL | {"steps": 2}))
    train(seqpar.Group.alone(), recipe, TEXT, checkpoint=folder, resume=True)


def change(folder, how):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    how(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_metadata_that_call_a_function(saved, tmp_path):
    mark = tmp_path / "was-run"
    change(saved, lambda metadata: setattr(metadata, "planner_data", Runs(mark)))
    with pytest.raises(OSError, match=r"it names posix\.mkdir, which no checkpoint needs"):
        resume(tmp_path)
    assert not mark.exists()


class Reaches:
    """Unpickled by `getattr`, as members of an enum are by some Pythons."""

    def __init__(self, of, name):
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_only_members_of_an_enum_are_reached_by_getattr(saved, tmp_path):
    change(
        saved, lambda metadata: setattr(metadata, "planner_data", Reaches(torch.Size, "__init__"))
    )
    with pytest.raises(OSError, match=r"it names __init__ of .*Size.*, which no checkpoint needs"):
        resume(tmp_path)


def test_a_member_of_an_enum_is_read(saved, tmp_path):
    member = Reaches(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")
    change(saved, lambda metadata: setattr(metadata.storage_meta, "save_id", member))
    resume(tmp_path)


def test_an_entry_that_calls_a_function(saved, tmp_path):
    mark = tmp_path / "was-run"

    def replace(metadata):
        info = metadata.storage_data[MetadataIndex("optimizer.param_groups.0.lr")]
        buffer = io.BytesIO()
        torch.save(Runs(mark), buffer)
        (saved / "other.distcp").write_bytes(buffer.getvalue())
        info.relative_path, info.offset, info.length = "other.distcp", 0, len(buffer.getvalue())

    change(saved, replace)
    with pytest.raises(OSError, match=r"posix\.mkdir"):
        resume(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("path", ["../other", "/etc/passwd", Path("a/b")])
def test_metadata_that_read_another_folder(saved, tmp_path, path):
    def elsewhere(metadata):
        next(iter(metadata.storage_data.values())).relative_path = path

    change(saved, elsewhere)
    with pytest.raises(OSError, match="elsewhere"):
        resume(tmp_path)


def test_weights_alone_are_read_as_carefully(saved, tmp_path):
    mark = tmp_path / "was-run"
    change(saved, lambda metadata: setattr(metadata, "planner_data", Runs(mark)))
    with pytest.raises(OSError, match="which no checkpoint needs"):
        checkpoint.load_model(saved, torch.nn.Linear(1, 1))
    assert not mark.exists()
