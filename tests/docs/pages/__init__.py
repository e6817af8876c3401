"""Runs the code of README and docs: `blocks` reads marks, `ranks` runs Python, `settings` gives names."""
