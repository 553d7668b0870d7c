#!/usr/bin/env bash
# Makes a virtual environment from the lock file: scripts/setup.sh <folder> [requirement...]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
shift

python=${PYTHON:-python3}
"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"gradpost needs Python 3.11 or newer; this is {sys.version.split()[0]}. "
             "Set PYTHON=/path/to/python3.11 and run make again.")
PY
# Anew whenever the locks change: an old environment would keep what they no longer name.
"$python" -m venv --clear "$venv"
echo "Setting up $venv (once) ..."
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet -r requirements-dev.lock "$@"
pip install --quiet --no-deps --no-build-isolation -e ./client
touch "$venv/.ready"
