"""What moves bytes for gloo waits for a CPU, and nothing else of the process does."""

import os
import sys
from pathlib import Path

import pytest

from seqpar.comm.gloo_threads import calm_gloo, gloo_threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have policies on Linux")


def _policies(_):
    here = {int(path.name) for path in Path("/proc/self/task").iterdir()}
    ours = gloo_threads()
    return [{os.sched_getscheduler(x) for x in numbers} for numbers in (ours, here - {*ours})]


def _again(_):
    first = gloo_threads()[0]
    os.sched_setscheduler(first, os.SCHED_IDLE, os.sched_param(0))
    calm_gloo()
    policy = os.sched_getscheduler(first)
    os.sched_setscheduler(first, os.SCHED_BATCH, os.sched_param(0))
    return policy


def test_a_group_makes_batch_threads_of_those_of_gloo_alone(worlds):
    for of_gloo, others in worlds.run(2, _policies):
        assert of_gloo == {os.SCHED_BATCH}
        assert others == {os.sched_getscheduler(0)}


def test_a_thread_with_a_policy_of_its_own_keeps_it(worlds):
    assert worlds.run(1, _again) == [os.SCHED_IDLE]


def test_where_there_is_no_proc_nothing_happens(monkeypatch, tmp_path):
    monkeypatch.setattr("seqpar.comm.gloo_threads.TASKS", tmp_path / "none")
    calm_gloo()


def test_where_the_system_forbids_it_nothing_happens(monkeypatch):
    def refuse(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("seqpar.comm.gloo_threads.gloo_threads", lambda: [os.getpid()])
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    calm_gloo()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
