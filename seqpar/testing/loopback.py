"""`stay_on_loopback`, `loopback_store`: worlds on one machine that no other machine can connect to."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist

ADDRESS = "127.0.0.1"


def stay_on_loopback() -> None:
    """Lets gloo listen on the loopback interface alone, in this process and before it makes a group."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]  # "lo", "lo0"
    if names:
        os.environ["GLOO_SOCKET_IFNAME"] = names[0]


def loopback_store() -> dist.TCPStore:  # type: ignore[name-defined]
    """A store that is served by this process, on a port of its own."""
    # By itself a TCPStore listens on all interfaces, whatever address it is given.
    server = socket.create_server((ADDRESS, 0))
    port = server.getsockname()[1]
    return dist.TCPStore(  # type: ignore[attr-defined]
        ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
    )
