"""The parts of draw_modules.py: an SVG canvas, and a picture of each module."""
