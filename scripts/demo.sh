#!/usr/bin/env bash
# The main job on real text, end to end; writes report/index.html and report/report.json.
source "$(dirname "$0")/setup.sh"
exec python scripts/demo/demo.py "$@"
