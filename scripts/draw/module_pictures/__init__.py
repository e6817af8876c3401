"""The parts of modules.py: an SVG canvas, and a picture of each module."""
