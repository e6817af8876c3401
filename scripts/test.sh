#!/usr/bin/env bash
# The whole test suite, on all cores; arguments go to pytest, e.g. bash scripts/test.sh tests/layout -x
source "$(dirname "$0")/setup.sh"
if [ $# -eq 0 ]; then # workers take a while to start: for a few tests only where -n asks for them
    set -- --numprocesses logical --maxprocesses 8 --dist worksteal
fi
exec python -m pytest "$@"
