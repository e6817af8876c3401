# Sourced by the other scripts: makes .venv and installs the package for development, once.
# It is done again when pyproject.toml or the lock changes.
# SEQPAR_VENV and SEQPAR_CONSTRAINT name others, for other versions, SEQPAR_EXTRAS what is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${SEQPAR_VENV:-.venv} constraint=${SEQPAR_CONSTRAINT:-scripts/lock.txt} python=""
for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "the lock is for Python 3.11 to 3.14, which torch has wheels for; set PYTHON=/path/to/python3" >&2
    exit 1
fi
stamp=$(cat pyproject.toml "$constraint" | cksum)
if [ "$(cat "$venv/seqpar-stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "setting up $venv (a few minutes)" >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    # Without build isolation, which would build with the newest hatchling and not the locked one.
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraint")
    "${pip[@]}" hatchling hatch-fancy-pypi-readme editables
    "${pip[@]}" --no-build-isolation --editable ".[${SEQPAR_EXTRAS:-dev}]"
    echo "$stamp" > "$venv/seqpar-stamp"
fi
export PATH="$(realpath "$venv")/bin:$PATH" OMP_NUM_THREADS=1
