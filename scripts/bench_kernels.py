"""`scripts/measure/kernel_speed.py`, by the name it had before."""

from moved import run

run("measure/kernel_speed.py")
