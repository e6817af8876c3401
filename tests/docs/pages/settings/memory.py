"""What the block of docs/memory.md needs."""

import torch

import seqpar
from seqpar.comm import silent


def held():
    yield {"torch": torch, "seqpar": seqpar, "group": silent(0, 64)}
