"""`TorchrunWorld`: the processes that torchrun started, used as a `ProcessWorld` is."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist

from seqpar.comm import Group


class TorchrunWorld:
    """The processes that torchrun started, over gloo. Each of them makes one, and all must `run`.

    Raises:
        RuntimeError: torchrun did not start this process.
    """

    def __init__(self) -> None:
        if not self.is_here():
            raise RuntimeError("torchrun did not start this process; use ProcessWorld")
        dist.init_process_group("gloo")
        self._group = Group.of()
        self.rank, self.size = self._group.rank, self._group.size

    @staticmethod
    def is_here() -> bool:
        """Whether torchrun started this process."""
        return dist.is_torchelastic_launched()

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """`fn(group, *args)` on every rank; the results by rank, on every rank. They are pickled."""
        mine = base64.b64encode(pickle.dumps(fn(self._group, *args))).decode()
        everyone = cast("list[str]", self._group.transport.gather_objects(mine))
        return [pickle.loads(base64.b64decode(text)) for text in everyone]

    def __enter__(self) -> TorchrunWorld:
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()
