# Each target does all the set-up it needs. Python >= 3.11, pip and make are enough.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
TORCH := .venv-torch
INTEGRATIONS := .venv-integrations
PY := $(VENV)/bin/python
CODE := service kernels client/src scripts benchmarks examples tests
LOCKS := requirements.lock requirements-dev.lock scripts/setup.sh client/pyproject.toml

.PHONY: help serve demo test test-torch test-integrations lint format bench bench-quick crash soak digests \
	renew-digests openapi lock lint-container container-check

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 19

$(VENV)/.ready: $(LOCKS)
	@scripts/setup.sh $(VENV)

$(TORCH)/.ready: $(LOCKS)
	@scripts/setup.sh $(TORCH) torch==2.13.0 expecttest

$(INTEGRATIONS)/.ready: $(LOCKS) requirements-integrations.txt
	@scripts/setup.sh $(INTEGRATIONS) -r requirements-integrations.txt

serve: $(VENV)/.ready ## start a server on 127.0.0.1:8000
	$(PY) -m service serve

demo: $(VENV)/.ready ## five optimizers, in a server, train a digit classifier over HTTP
	$(PY) -m examples.demo

test: $(VENV)/.ready ## all tests that need no torch
	$(PY) -m pytest -q tests

test-torch: $(TORCH)/.ready ## live parity with torch 2.13
	GRADPOST_TEST_TORCH=1 $(TORCH)/bin/python -m pytest -q tests/torch

test-integrations: $(INTEGRATIONS)/.ready ## transformers, accelerate, lightning, DDP
	GRADPOST_TEST_INTEGRATIONS=1 $(INTEGRATIONS)/bin/python -m pytest -q tests/integrations

lint: $(VENV)/.ready ## ruff, mypy, import-linter
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy
	PYTHONPATH=. $(VENV)/bin/lint-imports

format: $(VENV)/.ready ## rewrite in the house style
	$(VENV)/bin/ruff check --fix $(CODE)
	$(VENV)/bin/ruff format $(CODE)

bench-quick: $(VENV)/.ready ## kernels, push_pull and durable pushes in a few minutes, as ratios
	@mkdir -p build
	$(PY) -m benchmarks.kernels --quick --json build/kernels.json
	$(PY) -m benchmarks.push_pull --quick --json build/push_pull.json
	$(PY) -m benchmarks.durable_push --quick --folder build --json build/durable_push.json

bench: $(TORCH)/.ready ## the same at length, beside torch
	$(TORCH)/bin/python -m benchmarks.kernels
	$(TORCH)/bin/python -m benchmarks.push_pull
	$(TORCH)/bin/python -m benchmarks.durable_push
	$(TORCH)/bin/python -m benchmarks.durable_session
	$(TORCH)/bin/python -m benchmarks.rounds

crash: $(VENV)/.ready ## 1,200 kills, 100,000 power cuts, 10,000 flipped bits; half an hour
	$(PY) -m tests.crash.run --kills 1200
	CRASH_SCALE=50 $(PY) -m pytest -q --timeout=0 tests/storage/test_crashes.py -k every_crash
	CRASH_SCALE=12 $(PY) -m pytest -q --timeout=0 tests/storage/test_flips.py

soak: $(VENV)/.ready ## 16 worker processes, killed at random, and a server, killed at random; a minute
	$(PY) -m tests.crash.soak --seconds 60 --workers 16

digests: $(VENV)/.ready ## every loop's digest under four processors, beside kernels/revision.py
	$(PY) -m scripts.digests

renew-digests: $(VENV)/.ready ## write the table of kernels/revision.py
	$(PY) -m scripts.digests --renew

openapi: $(VENV)/.ready ## write docs/openapi.json
	PYTHONPATH=. $(PY) scripts/openapi.py

lock: ## resolve the lock files anew
	scripts/lock.sh

lint-container: $(VENV)/.ready ## hadolint on the Dockerfile
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/lint_container.sh

container-check: $(VENV)/.ready ## run the Dockerfile's steps without an engine, then its healthcheck
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/container_check.sh
