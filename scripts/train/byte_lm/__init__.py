"""The parts of byte_level.py: a recipe, its text, ranks, model, steps, checkpoints and records."""
