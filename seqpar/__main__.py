"""`python -m seqpar`: the `seqpar` command."""

import sys

from seqpar.cli import main

if __name__ == "__main__":  # the ranks that the self-check starts import this file too
    sys.exit(main())
