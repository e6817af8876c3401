"""Runs the code of README and docs: `blocks` reads marks, `run_blocks` runs Python, `settings` gives names."""
