"""`scripts/train/byte_level.py`, by the name it had before."""

from moved import run

run("train/byte_level.py")
