#!/bin/sh
# Runs the Dockerfile's steps without a container engine: clean folder, empty environment, new
# virtual environment; then its CMD on loopback, its HEALTHCHECK, and a stop. Prints what it proves.
#
#   scripts/container_check.sh [PYTHON]      PYTHON stands for the base image's (default python3.11)
#   GRADPOST_CHECK_KEEP=1 keeps the folder.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3.11}
exec "$python" scripts/container.py check
