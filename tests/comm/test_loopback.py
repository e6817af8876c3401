"""Worlds on one machine listen where no other machine can connect."""

import os
import sys
from pathlib import Path

import pytest

from seqpar.testing.loopback import loopback_store, stay_on_loopback

LISTENS, LOOPBACK = "0A", {"0100007F", "0" * 24 + "01000000"}  # as the kernel writes them

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def listening():
    """The addresses on which this process listens."""
    links = [Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    mine = {os.readlink(link) for link in links if link.is_symlink()}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/self/net", name).read_text().splitlines()[1:]
    ]
    return {f[1].split(":")[0] for f in lines if f[3] == LISTENS and f"socket:[{f[9]}]" in mine}


def addresses(_):
    return listening(), os.environ["GLOO_SOCKET_IFNAME"]


def test_processes_of_a_world(unused_processes):
    for found, interface in unused_processes(2).run(addresses):
        assert found
        assert found <= LOOPBACK, found
        assert interface == "lo"


def test_whatever_the_user_chose_for_other_groups(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    stay_on_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_store():
    before = listening()
    store = loopback_store()
    assert listening() - before <= LOOPBACK
    assert listening() & LOOPBACK
    store.set("a", "b")
