"""What a run tells about its steps: metrics in JSON lines, and the text of a log."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from seqpar import Group


@dataclass(frozen=True)
class StepRecord:
    """One step.

    Args:
        step: from 0.
        loss: the mean over all tokens of all ranks and micro-batches.
        grad_norm: of the whole gradient, before clipping.
        seconds: from the start of the step to its end, on this rank.
        tokens_per_second: of all ranks together.
        peak_bytes: the most memory that any rank has held so far: allocated on its GPU, or resident in its
            process, with code and libraries; `None` where the system does not say.
    """

    step: int
    loss: float
    grad_norm: float
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None

    @property
    def text(self) -> str:
        """What a log tells of it."""
        rate = f"{self.tokens_per_second:.0f} tokens/s"
        return f"loss {self.loss:.4f}, gradient norm {self.grad_norm:.3g}, {rate}"


OnStep = Callable[[StepRecord], None]


def peak_bytes(group: Group, device: torch.device) -> int | None:
    """The most memory that any rank has held so far. All ranks must call."""
    mine = torch.zeros((), dtype=torch.long, device=device)
    if device.type == "cuda":
        mine.fill_(torch.cuda.max_memory_allocated(device))
    elif sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        mine.fill_(int(status.split("VmHWM:")[1].split()[0]) * 1024)
    group.all_reduce_(mine, "max")
    return int(mine) or None


class MetricsFile:
    """JSON lines, one for each step, flushed as it ends. A resumed run goes on where it resumes.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        kept = []
        if first_step and path.is_file():
            lines = path.read_text().splitlines(keepends=True)
            # A line without an end is all that a run which was killed may leave of a step.
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["step"] < first_step]
        self._file = path.open("w")
        self._file.writelines(kept)

    def write(self, record: StepRecord) -> None:
        """Adds a line."""
        print(json.dumps(asdict(record)), file=self._file, flush=True)

    def close(self) -> None:
        """No more steps."""
        self._file.close()
