#!/usr/bin/env bash
# Resolves the version ranges of pyproject.toml anew, in clean environments, into the lock files.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "The locks are made by Python 3.11 or newer; set PYTHON=/path/to/it." >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

resolve() {  # resolve <lock file> <requirement>...
    local lock=$1
    shift
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet --upgrade pip
    "$work/venv/bin/python" -m pip install --quiet "$@"
    {
        echo "# Made by \`make lock\` from pyproject.toml; exact versions, one environment for all."
        "$work/venv/bin/python" -m pip freeze --all --exclude pip --exclude gradpost --exclude gradpost-server
    } >"$lock"
    rm -rf "$work/venv"
}

resolve requirements.lock . ./client "setuptools>=77" wheel
resolve requirements-dev.lock -c requirements.lock ".[dev,demo]" ./client "setuptools>=77" wheel
