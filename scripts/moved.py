"""Runs a script that lies in a folder of its verb, for the name that it had before."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def run(script: str) -> None:
    """Runs the script as if it had been started itself, by Python or by torchrun.

    Args:
        script: its path from this folder.
    """
    path = Path(__file__).parent / script
    sys.path.insert(0, str(path.parent))  # where its libraries lie, for the ranks it starts too
    runpy.run_path(str(path), run_name="__main__")
