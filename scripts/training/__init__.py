"""The parts of train_bytes.py: a recipe, its text, ranks, model, steps, checkpoints and records."""
