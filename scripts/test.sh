#!/usr/bin/env bash
# The whole test suite; arguments go to pytest, e.g. bash scripts/test.sh tests/layout -x
source "$(dirname "$0")/setup.sh"
exec python -m pytest "$@"
