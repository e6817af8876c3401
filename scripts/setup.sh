# Sourced by the other scripts: makes .venv and installs the package for development, once.
# It is done again when pyproject.toml or the constraints change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=""
for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "seqpar needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2
    exit 1
fi
stamp=$(cat pyproject.toml scripts/constraints.txt | cksum)
if [ "$(cat .venv/seqpar-stamp 2>/dev/null)" != "$stamp" ]; then
    echo "setting up .venv (about a minute)" >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint scripts/constraints.txt --editable '.[dev]'
    echo "$stamp" > .venv/seqpar-stamp
fi
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
