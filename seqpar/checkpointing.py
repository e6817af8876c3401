"""Activation checkpointing that keeps what attention gave: its forward and its messages happen once."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from seqpar.comm import Replay
from seqpar.host_memory import current_host_memory
from seqpar_kernels.torch_internals import is_traced_here


def keep_attention() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """A `context_fn` of `torch.utils.checkpoint`: keeps attention's results and recomputes the rest.

    For `checkpoint(block, x, use_reentrant=False, context_fn=seqpar.keep_attention)`, and under that name
    wherever a library hands arguments on to it. Kept is (out, lse) of every attention inside; in Ulysses and
    the hybrid also q, k and v as they were exchanged, so that nothing is sent a second time. Serves every
    strategy, in `torch.compile` too. What attention gave must not be written to in place. In a block of
    `seqpar.saved_on_host` the host keeps it.
    """
    if is_traced_here():
        return create_selective_checkpoint_contexts([torch.ops.seqpar.sharded_attention.default])
    host = current_host_memory()
    replay = Replay() if host is None else Replay(pack=host.pack, unpack=host.unpack)
    return replay.record(), _Again(replay)


class _Again:
    """Plays the replay whenever it is entered: a graph that is kept goes backward more than once."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    def __enter__(self) -> None:
        self._playing = self._replay.play()
        self._playing.__enter__()

    def __exit__(self, *error: object) -> None:
        self._playing.__exit__(*error)  # type: ignore[arg-type]
