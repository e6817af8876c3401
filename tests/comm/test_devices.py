"""Tensors of a device that a group cannot send are refused on every rank, before a message."""

import pytest
import torch
import torch.distributed as dist

from seqpar import DesyncError, Mask, Plan, attention, contiguous, simulate, unshard_sequence
from seqpar.comm.processes import ProcessTransport, unserved
from seqpar.comm.threads import ThreadTransport
from seqpar.decode import KVCache


@pytest.mark.parametrize(
    ("backends", "device", "current", "words"),
    [
        ("cpu:gloo", "cpu", None, None),
        ("cpu:gloo,cuda:gloo", "cpu", None, None),
        ("cpu:gloo,cuda:gloo", "cuda:0", 0, "cannot be sent in a group of cpu:gloo,cuda:gloo"),
        ("cpu:gloo", "cuda:0", 0, "'cpu:gloo,cuda:nccl'"),
        ("cuda:nccl", "cpu", None, "tensors on cpu cannot be sent"),
        ("cuda:nccl", "cuda:0", 0, None),
        ("cpu:gloo,cuda:nccl", "cuda:1", 1, None),
        ("cpu:gloo,cuda:nccl", "cuda:1", 0, "the current device of this process is cuda:0"),
        ("cpu:gloo,cuda:nccl", "cpu", None, None),
    ],
)
def test_which_devices_a_group_sends_from(backends, device, current, words):
    reason = unserved(backends, torch.device(device), current)
    assert reason is None if words is None else words in reason


def test_backends_are_told_as_torch_tells_them():
    assert (
        unserved(str(dist.BackendConfig(dist.Backend("nccl"))), torch.device("cuda:0"), 0) is None
    )
    gloo = str(dist.BackendConfig(dist.Backend("gloo")))
    assert unserved(gloo, torch.device("cpu"), None) is None
    assert unserved(gloo, torch.device("cuda", 0), 0) is not None


def refuse(transport, _device):
    if transport.rank == 1:
        raise ValueError("not from this device")


def attends(group, x, layout):
    attention(x, x, x, Plan(group, layout, Mask(causal=True)))


def gathers(group, x, layout):
    unshard_sequence(x, layout, group)


def caches(group, x, layout):
    KVCache(group, layout, x, x)


@pytest.mark.parametrize("call", [attends, gathers, caches])
def test_what_one_rank_cannot_send_no_rank_sends(call, monkeypatch):
    monkeypatch.setattr(ThreadTransport, "check_device", refuse)

    def rank_main(group):
        kind = ValueError if group.rank == 1 else DesyncError
        with pytest.raises(kind, match="not from this device"):
            call(group, torch.randn(1, 4, 2, 8), contiguous(12, group.size))
        return group.traffic.total.bytes

    assert simulate(3, rank_main) == [0, 0, 0]


class Backend:
    """A process group of two that says what its backends are."""

    group_name = "a group"


@pytest.mark.parametrize("backends", ["cuda:nccl", "cpu:gloo,cuda:nccl", "cpu:gloo"])
def test_a_group_whose_calls_wait_for_the_device_says_so(backends, monkeypatch, caplog):
    for name, value in (
        ("get_backend_config", backends), ("get_rank", 0), ("get_world_size", 2), ("get_global_rank", 0)
    ):  # fmt: skip
        monkeypatch.setattr(dist, name, lambda *_, value=value: value)
    monkeypatch.setattr("seqpar.comm.processes._watch", lambda _: None)
    monkeypatch.setattr("seqpar.comm.processes.calm_gloo", lambda: None)
    group = Backend()
    with caplog.at_level("WARNING", "seqpar"):
        transport = ProcessTransport(group, 60.0)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (backends == "cuda:nccl")
    assert all("'cpu:gloo,cuda:nccl'" in line and "agree='plan'" in line for line in told)
    if "gloo" in backends:
        transport.check_device(torch.device("cpu"))
    else:
        with pytest.raises(
            ValueError, match="tensors on cpu cannot be sent in a group of cuda:nccl"
        ):
            transport.check_device(torch.device("cpu"))
    transport.check_device(torch.device("meta"))
