"""The parts of fuzz.py: what is drawn, and how it is judged."""
