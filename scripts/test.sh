#!/usr/bin/env bash
# The whole test suite, on all cores; arguments go to pytest, e.g. bash scripts/test.sh tests/layout -x
source "$(dirname "$0")/setup.sh"
if [ $# -eq 0 ]; then # a worker takes 3 s to start: not for a few tests, where -n 2 asks for it
    set -- --numprocesses logical --maxprocesses 8 --dist worksteal
fi
exec python -m pytest "$@"
