"""The OpenAPI document: valid, fresh, and complete in its refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
from openapi_spec_validator import validate

from service.app import create_app
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def document():
    return create_app(Settings()).openapi()


def test_it_is_valid(document):
    validate(document)


def test_the_one_in_the_repository_is_fresh():
    script = [sys.executable, "scripts/openapi.py", "--check"]
    done = subprocess.run(
        script, cwd=ROOT, env={"PYTHONPATH": "."}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_operation_of_sessions_lists_its_problems(document):
    for path, operations in document["paths"].items():
        if not path.startswith("/v1/sessions"):
            continue
        for method, operation in operations.items():
            refusals = {s: r for s, r in operation["responses"].items() if s >= "400"}
            assert {"401", "403", "500"} <= refusals.keys(), (method, path)
            for answer in refusals.values():
                assert "application/problem+json" in answer["content"]
            if method in ("put", "post", "patch"):
                assert {"411", "413", "415", "422"} <= refusals.keys(), (method, path)
                assert operation["requestBody"]["content"]
            if "{id}" in path and method != "put":
                assert {"404", "410"} <= refusals.keys(), (method, path)
