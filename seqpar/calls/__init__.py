"""What a call must fulfil, what it is told and written as, and what it sends, holds and computes."""

from seqpar.calls import dry_run
from seqpar.calls.check import agree_on_call, check_call, resolve
from seqpar.calls.shape import Shape, Volume

__all__ = [
    "Shape",
    "Volume",
    "agree_on_call",
    "check_call",
    "dry_run",
    "resolve",
]
