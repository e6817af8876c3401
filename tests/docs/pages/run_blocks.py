"""Runs the Python blocks of a page that share a setting, on one rank of a world of processes."""

from __future__ import annotations

import os
import re
import warnings
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

import seqpar
from pages.blocks import ROOT, Block
from seqpar.testing.loopback import ADDRESS, loopback_store

STORES: list[dist.TCPStore | None] = []  # as long as the process lives


def settings_of(page: str) -> ModuleType | None:
    """The settings of a page, if it has any."""
    name = re.sub(r"\W", "_", page.removeprefix("docs/").removesuffix(".md").lower())
    there = (Path(__file__).parent / "settings" / f"{name}.py").exists()
    return import_module(f"pages.settings.{name}") if there else None


def run(group: seqpar.Group, blocks: list[Block]) -> list[str]:
    """What each block printed on this rank. Its process can do nothing else afterwards."""
    (name, size), page = blocks[0].setting, blocks[0].page
    warnings.simplefilter("error", DeprecationWarning)
    STORES.append(as_torchrun_starts_it(group))  # a slower rank may need it when this one is done
    if size > 1 and not any("init_process_group(" in block.text for block in blocks):
        dist.init_process_group("gloo")
    if name is None:
        return execute(blocks, {})
    setting = getattr(settings_of(page), name.replace(" ", "_"))()
    names = next(setting)
    names.update(torch=torch, seqpar=seqpar)
    printed = execute(blocks, names)
    try:
        setting.send(printed)
    except StopIteration:
        return printed
    raise AssertionError(f"{page}: setting {name} must yield once")


def as_torchrun_starts_it(group: seqpar.Group) -> dist.TCPStore | None:
    """No process group any more, and the environment of torchrun; on rank 0, the store of its ranks."""
    store = None
    if group.rank == 0:
        store = loopback_store()
    port = group.transport.gather_objects(store and store.port)[0]
    rank, size = str(group.rank), str(group.size)
    dist.destroy_process_group()
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": ADDRESS, "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "a page"}
    return store


def execute(blocks: list[Block], names: dict[str, Any]) -> list[str]:
    """What each block prints, one after the other with the same names; tracebacks point into the page."""
    names["__name__"] = "__main__"
    printed = []
    for block in blocks:
        code = compile("\n" * (block.line - 1) + block.code, ROOT / block.page, "exec")
        with redirect_stdout(StringIO()) as out:
            exec(code, names)
        printed.append(out.getvalue())
    return printed
