"""`scripts/measure/peak_memory.py`, by the name it had before."""

from moved import run

run("measure/peak_memory.py")
