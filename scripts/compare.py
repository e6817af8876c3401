"""`seqpar bench`, from a checkout.

Example: python scripts/compare.py --length 8192 --ranks 2 --dtype float32 bfloat16
"""

import sys

from seqpar.cli import main

if __name__ == "__main__":  # the ranks that it starts import this file too
    sys.exit(main(["bench", *sys.argv[1:]]))
