"""Runs the code of README and docs: `blocks` reads marks, `run_blocks` runs it, `settings` gives names."""
