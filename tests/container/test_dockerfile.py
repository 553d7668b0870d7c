import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]


def _container():
    spec = importlib.util.spec_from_file_location("container", ROOT / "scripts/container.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules["container"] = module
    spec.loader.exec_module(module)
    return module


container = _container()
STEPS = container.parse((ROOT / "Dockerfile").read_text())
FINAL = STEPS[max(i for i, step in enumerate(STEPS) if step.word == "FROM") :]


def test_two_stages_on_the_slim_image():
    bases = [step.rest.split()[0] for step in STEPS if step.word == "FROM"]
    assert bases == ["python:3.11-slim", "python:3.11-slim"]


def test_every_copied_path_exists_and_is_not_ignored():
    rules = container.ignore_rules()
    sources = [s for stage, paths, _ in container.copies(STEPS) if stage is None for s in paths]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        files = [ROOT / source] if (ROOT / source).is_file() else (ROOT / source).rglob("*.py")
        kept = [f for f in files if not container.ignored(f.relative_to(ROOT).as_posix(), rules)]
        assert kept, source


def test_stages_that_are_copied_from_exist():
    names = {step.rest.partition(" AS ")[2] for step in STEPS if step.word == "FROM"}
    assert {stage for stage, _, _ in container.copies(STEPS) if stage} <= names


@pytest.mark.parametrize("name", ["Makefile", ".venv/bin/python", ".git/config", "tests/x.py"])
def test_the_context_holds_nothing_else(name):
    assert container.ignored(name, container.ignore_rules())


@pytest.mark.parametrize("name", ["service/__pycache__/app.pyc", "kernels/__pycache__/a.nbi"])
def test_the_context_holds_no_build_output(name):
    assert container.ignored(name, container.ignore_rules())


def test_it_runs_as_a_numbered_user_that_is_not_root():
    users = [step.rest for step in FINAL if step.word == "USER"]
    assert len(users) == 1
    assert all(part.isdigit() and int(part) > 0 for part in users[0].split(":"))


def test_both_stages_name_the_same_processor():
    chosen = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_CACHE_DIR")
    found = [container.environment(step.rest) for step in STEPS if step.word == "ENV"]
    assert [[env[name] for name in chosen] for env in found] == [
        ["x86-64-v3", "", "/app/.cache/kernels"]
    ] * 2


def test_its_settings_are_real_and_hold_no_secret():
    names = {n for s in STEPS if s.word in ("ENV", "ARG") for n in container.environment(s.rest)}
    ours = {name for name in names if name.startswith("GRADPOST_")}
    assert ours <= {"GRADPOST_" + name.upper() for name in Settings.model_fields}
    assert "GRADPOST_API_KEY" not in names


def test_commands_and_port():
    assert container.command(STEPS, "CMD") == ["python", "-m", "service", "serve"]
    assert container.command(STEPS, "HEALTHCHECK") == ["python", "-m", "service", "health"]
    assert [step.rest for step in FINAL if step.word == "EXPOSE"] == ["8000"]


def test_compose_demands_a_key_and_gives_time_to_stop():
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["gradpost"]
    assert service["environment"]["GRADPOST_API_KEY"].startswith("${GRADPOST_API_KEY:?")
    assert set(service["environment"]) <= {"GRADPOST_" + n.upper() for n in Settings.model_fields}
    assert int(service["stop_grace_period"].removesuffix("s")) > Settings().shutdown_timeout_s
    assert service["read_only"] is True


def test_hadolint_has_no_complaint():
    places = [ROOT / ".venv/bin", ROOT / ".cache/hadolint/bin"]
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=":".join(map(str, places)))
    if hadolint is None:
        pytest.skip("hadolint is not installed (scripts/lint_container.sh installs it)")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
