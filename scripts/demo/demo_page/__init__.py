"""The page that demo.py writes: its figures, its words, its style."""
