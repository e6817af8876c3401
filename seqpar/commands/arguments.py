"""What several commands and scripts have in common: their parsers, and what arguments may be."""

from __future__ import annotations

import argparse

from seqpar_kernels import DTYPES

DTYPE_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of a script as it stands, with the example at its end."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
