"""The parts of kernel_speed.py: who is measured, in which rounds, which tiles, and tables."""
