"""The rooms and their one direction, and what the documents say of the repository."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FASTAPI_MAY_APPEAR = ("service/app.py", "service/errors.py", "service/routes/")


def modules(*folders):
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def contracts(folder):
    script = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [script, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{folder}:{folder / 'client' / 'src'}"},
    )  # fmt: skip


def test_the_contracts_hold():
    done = contracts(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "planted"),
    [
        ("kernels/rules.py", "import service.settings"),
        ("service/wire/raw.py", "import service.sessions.session"),
        ("service/sessions/lane.py", "import service.routes.steps"),
        ("service/sessions/lane.py", "import service.connection"),
        ("service/sessions/lane.py", "import service.answers"),
        ("service/schemas/control.py", "import service.sessions.session"),
        ("service/hyper.py", "import service.schemas"),
        ("service/limits.py", "import service.sessions.registry"),
        ("service/settings.py", "import service.limits"),
        ("service/settings.py", "import kernels.cpu"),
        ("service/connection.py", "import service.sessions.session"),
        ("service/nowhere.py", "import service.errors"),
        ("service/storage/ring.py", "import service.wire.raw"),
        ("service/storage/check.py", "import service.errors"),
        ("service/storage/ring.py", "import service.storage.index"),
        ("service/storage/files.py", "import service.storage.header"),
        ("client/src/gradpost/session.py", "import kernels.cpu"),
    ],
)
def test_the_contracts_catch_a_planted_violation(tmp_path, file, planted):
    for name in ("service", "kernels", "client", "pyproject.toml"):
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(source, tmp_path / name)
    victim = tmp_path / file
    before = victim.read_text() if victim.exists() else ""
    victim.write_text(f"{before}\n{planted}\n")
    assert "BROKEN" in contracts(tmp_path).stdout


def test_fastapi_stays_in_its_rooms():
    for path in modules("service", "kernels", "client/src"):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(FASTAPI_MAY_APPEAR):
            assert not any(module.split(".")[0] == "fastapi" for module in imports(path)), name


def test_the_storage_needs_xxhash_only():
    for path in modules("service/storage"):
        for module in imports(path):
            first = module.split(".")[0]
            known = first in sys.stdlib_module_names or first == "xxhash"
            assert known or module.startswith("service.storage"), (path, module)


def test_numba_stays_in_the_kernels():
    for path in modules("service", "client/src", "examples"):
        assert not any(m.split(".")[0] in ("numba", "llvmlite") for m in imports(path)), path


def test_the_protocol_needs_numpy_only():
    for path in modules("client/src/gradpost/protocol"):
        for module in imports(path):
            first = module.split(".")[0]
            assert first in sys.stdlib_module_names or first in ("numpy", "gradpost"), module
            assert first != "gradpost" or module.startswith("gradpost.protocol"), module


def test_the_server_takes_the_protocol_only_from_the_client():
    for path in modules("service"):
        for module in imports(path):
            if module.split(".")[0] == "gradpost":
                assert module.startswith("gradpost.protocol"), (path, module)


def test_no_loop_is_compiled_by_a_bare_decorator():
    for path in modules("kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            for decorator in getattr(node, "decorator_list", []):
                name = ast.unparse(decorator).split(".")[-1]
                assert name not in ("njit", "jit", "vectorize", "guvectorize", "stencil"), path


def test_every_compiled_loop_states_its_error_model_and_none_is_fastmath():
    found = 0
    for path in modules("kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert "fastmath" not in options, path
            if ast.unparse(node.func).split(".")[-1] in ("njit", "jit", "register_jitable"):
                found += 1
                assert options.get("error_model") == "'numpy'", (path, node.lineno)
    assert found


def test_every_silenced_complaint_has_its_reason():
    mark = re.compile(r"# (?:type: ignore\[[^]]*\]|noqa: [A-Z]+[0-9]+)(.*)")
    for path in modules("service"):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if found := mark.search(line):
                before = lines[number - 1].strip()
                reason = re.sub(r"# (type: ignore|noqa)\S*", "", found[1])
                assert re.search(r"[a-z]{3}", reason) or before.startswith("#"), (path, number + 1)
            assert not re.search(r"# (type: ignore(?!\[)|noqa(?!: ))", line), (path, number + 1)


def test_one_version():
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    client = tomllib.loads((ROOT / "client/pyproject.toml").read_text())["project"]["version"]
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    from gradpost import __version__
    from service.routes.server import VERSION

    assert {root, client, changes, __version__, VERSION} == {root}


def test_links_of_the_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "client" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), (page, target)


def test_the_trainer_of_the_readme_trains(monkeypatch, capsys):
    from gradpost import InProcess, Session
    from service.app import create_app
    from service.settings import Settings

    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    with InProcess(create_app(Settings(log_level="error"))) as app:
        create = Session.create
        monkeypatch.setattr(Session, "create", lambda url, *a, **k: create(app, *a, **k))
        exec(compile(code, "README.md", "exec"), {})
    step, *values = re.findall(r"-?\d+\.?\d*", capsys.readouterr().out)
    assert step == "300"
    assert all(abs(float(value) - i) < 0.05 for i, value in enumerate(values))


def test_the_lock_files_are_plain_pins():
    for name in ("requirements.lock", "requirements-dev.lock"):
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)


def test_torch_stays_in_its_room():
    for path in modules("service", "kernels", "client/src", "examples"):
        if "gradpost/torch/" not in path.as_posix() and path.name != "data_parallel.py":
            assert not any(m.split(".")[0] == "torch" for m in imports(path)), path
