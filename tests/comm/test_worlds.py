"""Worlds fail loudly: errors come with their rank, waits that cannot end are found, misuse is caught."""

import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import seqpar
from seqpar import DesyncError, Group, simulate
from seqpar.comm import agree, agreed, all_gather
from seqpar.testing import ProcessWorld, WorldError


def test_results_come_by_rank_and_arguments_are_passed():
    assert simulate(3, lambda group, x: (group.rank, group.size, x), "a") == [
        (0, 3, "a"), (1, 3, "a"), (2, 3, "a"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="at least one rank"):
        simulate(0, lambda group: None)


def test_grad_mode_of_the_caller_holds_in_the_ranks():
    with torch.no_grad():
        assert simulate(2, lambda group: torch.is_grad_enabled()) == [False, False]


def test_the_first_error_wins_and_names_its_rank():
    def fn(group):
        if group.rank == 1:
            raise KeyError("mine")
        all_gather(torch.ones(1), group, [1, 1, 1], 0)

    with pytest.raises(KeyError) as caught:
        simulate(3, fn)
    assert caught.value.__notes__ == ["raised on rank 1 of 3 of a simulated world"]


def test_a_rank_that_returned_is_not_waited_for():
    def fn(group):
        if group.rank == 0:
            all_gather(torch.ones(1), group, [1, 1], 0)

    with pytest.raises(
        DesyncError,
        match="rank 0 waits for rank 1 in all_gather, but rank 1 has returned",
    ):
        simulate(2, fn)


def test_ranks_that_all_wait_are_found():
    def fn(group):
        other = 1 - group.rank
        group.exchange("lonely", [], [(other, torch.empty(1))]).wait()

    with pytest.raises(DesyncError, match="every other rank waits too"):
        simulate(2, fn)


def test_ranks_in_different_primitives_are_found():
    def fn(group):
        other = 1 - group.rank
        mine, theirs = torch.ones(1), torch.empty(1)
        group.exchange(f"step {group.rank}", [(other, mine)], [(other, theirs)]).wait()

    with pytest.raises(DesyncError, match="in step"):
        simulate(2, fn)


def test_a_buffer_read_too_early_holds_nan_and_one_written_in_flight_is_caught():
    def early(group):
        buffer = torch.zeros(2)
        pending = group.exchange("x", [(1 - group.rank, torch.ones(2))], [(1 - group.rank, buffer)])
        before = buffer.clone()
        pending.wait()
        return before, buffer

    for before, after in simulate(2, early):
        assert before.isnan().all()
        assert (after == 1).all()

    def late(group):
        sent, buffer = torch.ones(2), torch.empty(2)
        pending = group.exchange("x", [(1 - group.rank, sent)], [(1 - group.rank, buffer)])
        sent.add_(1)
        pending.wait()

    with pytest.raises(AssertionError, match="under way"):
        simulate(2, late)


def test_messages_that_nobody_receives_are_found():
    def fn(group):
        group.exchange("lost", [(1 - group.rank, torch.ones(1))], []).wait()

    with pytest.raises(DesyncError, match="lost from rank 0 to 1"):
        simulate(2, fn)


def test_agreement_says_who_differs_in_what():
    def fn(group):
        claim = {"same": 1, "mask": "a" if group.rank == 1 else "b"}
        with pytest.raises(DesyncError) as caught:
            agree(group, claim)
        return str(caught.value)

    for message in simulate(3, fn):
        assert message.startswith("ranks disagree: mask is 'b' on ranks 0, 2, 'a' on rank 1.")


def test_one_refusal_is_everybodys():
    def fn(group):
        def checks():
            with agreed(group, operation="test") as claim:
                claim["x"] = 1
                if group.rank == 2:
                    raise ValueError("too long")

        with pytest.raises((ValueError, DesyncError)) as caught:
            checks()
        return type(caught.value), str(caught.value)

    *others, own = simulate(3, fn)
    assert own == (ValueError, "too long")
    assert others == [
        (DesyncError, "refused on every rank because of rank 2: ValueError: too long")
    ] * 2  # fmt: skip


def test_no_group_is_an_error_that_says_what_to_do():
    with pytest.raises(RuntimeError, match="torchrun"):
        Group.of()


def _die(group):
    if group.rank == 1:
        raise ValueError("this rank fails")
    all_gather(torch.ones(1), group, [1, 1], 0)


def _mesh(group):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "sp"))
    sp = Group.of(mesh["sp"])
    errors = []
    for wrong in (mesh, "world"):
        try:
            Group.of(wrong)
        except (ValueError, TypeError) as error:
            errors.append(str(error))
    return sp.rank, sp.size, all_gather(torch.tensor([group.rank]), sp, [1] * 4, 0).tolist(), errors


def test_groups_come_from_a_device_mesh(worlds):
    for rank, (sp_rank, sp_size, members, errors) in enumerate(worlds.run(8, _mesh)):
        assert (sp_rank, sp_size) == (rank % 4, 4)
        assert members == [rank // 4 * 4 + r for r in range(4)]
        assert "mesh['name']" in errors[0]
        assert "ProcessGroup" in errors[1]


def _destroyed(group):
    import torch.distributed as dist

    mine = dist.new_group(list(range(group.size)))
    late = Group.of(mine)
    all_gather(torch.ones(1), late, [1, 1], 0)
    dist.destroy_process_group(mine)
    del mine
    try:
        all_gather(torch.ones(1), late, [1, 1], 0)
    except RuntimeError as error:
        return str(error)


def test_a_group_does_not_keep_its_process_group_alive():
    with ProcessWorld(2) as world:
        assert all("has been destroyed" in message for message in world.run(_destroyed))


def test_a_failed_world_tells_and_is_gone():
    with ProcessWorld(2) as world:
        with pytest.raises(WorldError, match="this rank fails"):
            world.run(_die, timeout=30)
        assert not world.is_alive


def test_a_rank_that_exits_is_no_success():
    def fn(group):
        if group.rank == 1:
            sys.exit(0)

    with pytest.raises(RuntimeError, match=r"sys.exit\(0\) on rank 1 of 3"):
        simulate(3, fn)


def test_ranks_stop_when_the_world_is_interrupted():
    """The interrupt comes to the thread that waits; ranks would go on computing for ever."""
    # Workers of pytest-xdist ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    told = []

    def fn(group):
        other = 1 - group.rank
        try:
            for _ in range(10_000):
                time.sleep(0.002)
                got = torch.zeros(1)
                group.exchange("x", [(other, torch.ones(1))], [(other, got)]).wait()
        except DesyncError as error:
            told.append(str(error))

    main = threading.get_ident()
    threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            simulate(2, fn)
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 10
    while len(told) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(told) == 2
    assert all("the world was interrupted" in text for text in told)


def test_nothing_that_ranks_send_is_unpickled():
    """Whoever can send to a rank could run code there."""
    package = Path(seqpar.__file__).parent
    files = [path for path in package.rglob("*.py") if "testing" not in path.parts]
    assert len(files) > 100
    runs_code = re.compile(r"import pickle|from pickle|pickle\.|torch\.load\(|gather_object\(")
    assert [path for path in files if runs_code.search(path.read_text())] == []
