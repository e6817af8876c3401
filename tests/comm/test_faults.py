"""A rank that is gone, stopped or elsewhere is named by every other rank, in the time that was asked for."""

import os
import signal
import tempfile
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import seqpar

PATIENCE = 3.0  # seconds
SOON = 15.0  # seconds, far below those of the process group
LENGTH, ODD = 24, 1


def attention(group, n):
    """Attention number n, ready for backward."""
    layout = seqpar.contiguous(LENGTH, group.size)
    q = torch.randn(1, layout.rows[group.rank], 4, 8, requires_grad=True)
    return seqpar.RingAttention(group)(q, q, q, layout).sum()


def killed(group, then):
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(group, then):
    os.kill(os.getpid(), signal.SIGSTOP)


def raises(group, then):
    raise ValueError("a batch that cannot be read")


def leaves(group, then):
    return "left"


def at_another_group(group, then):
    """Goes on to an operation of all ranks while the others are at one of the group."""
    seqpar.comm.all_reduce(torch.ones(1), then)
    with seqpar.comm.agreed(then, operation="the next step"):
        pass


def before_a_call(group, everyone, fault):
    attention(group, 0)
    if group.rank == ODD:
        return fault(group, everyone)
    return attention(group, 1)


def before_backward(group, everyone, fault):
    loss = attention(group, 0)
    if group.rank == ODD:
        return fault(group, everyone)
    return loss.backward()


def inside_a_call(group, everyone, fault):
    """After agreement, where the second message of a ring would be sent."""
    if group.rank == ODD:
        exchange, calls = group.transport.exchange, []

        def failing(primitive, *args):
            calls.append(primitive)
            if calls.count("ring_pass") == 2:
                fault(group, everyone)
                raise SystemExit
            return exchange(primitive, *args)

        group.transport.exchange = failing
    return attention(group, 0)


def rank(pipe, rank, size, folder, phase, fault):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    # Of torch's own, which nothing here may need.
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    start = time.monotonic()
    try:
        everyone = seqpar.Group.of(patience=PATIENCE)
        # A group of its own for what the others are at, so that there are two.
        group = seqpar.Group.of(dist.new_group(list(range(size))), patience=PATIENCE)
        phase(group, everyone, fault)
        text = "nothing"
    except seqpar.DesyncError as error:
        text = f"DesyncError: {error}"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    pipe.send((text, time.monotonic() - start))
    os._exit(0)  # without a word to the others, as after an error that nobody catches


def outcome(size, phase, fault):
    """What each rank but the odd one was told, and after how many seconds; `None` if nothing in time."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["seqpar.testing.worlds"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for n in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=rank, args=(there, n, size, folder, phase, fault), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        deadline, told = time.monotonic() + 60, []
        for n, pipe in enumerate(pipes):
            if n != ODD:
                try:
                    told.append(
                        pipe.recv() if pipe.poll(max(0, deadline - time.monotonic())) else None
                    )
                except EOFError:
                    told.append(("died", 0.0))
        for process in processes:
            process.kill()
            process.join()
    return told


@pytest.mark.parametrize("fault", [killed, stopped, raises, leaves, at_another_group])
@pytest.mark.parametrize("phase", [before_a_call, inside_a_call, before_backward])
def test_every_other_rank_names_the_rank(phase, fault):
    for told in outcome(3, phase, fault):
        assert told is not None, "still waiting"
        text, seconds = told
        assert text.startswith("DesyncError"), text
        assert f"rank {ODD}" in text, text
        assert seconds < SOON, (text, seconds)


def slow(group, everyone):
    time.sleep(2.5 * PATIENCE)
    return attention(group, 1)


def test_a_rank_that_takes_its_time_is_waited_for():
    assert [text for text, _ in outcome(3, before_a_call, slow)] == ["nothing", "nothing"]
