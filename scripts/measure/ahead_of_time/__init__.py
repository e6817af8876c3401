"""The parts of kernel_resources.py: cases, what is compiled of them, and what comes of it."""
