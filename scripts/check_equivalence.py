"""`seqpar check`, from a checkout.

Example: torchrun --nproc-per-node 3 scripts/check_equivalence.py --json equivalence.json
"""

import sys

from seqpar.cli import main

if __name__ == "__main__":  # the ranks that it starts import this file too
    sys.exit(main(["check", *sys.argv[1:]]))
