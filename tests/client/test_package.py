"""What the package exports, and what its wheel holds."""

import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gradpost
import gradpost.protocol

CLIENT = Path(__file__).parents[2] / "client"


def public(module):
    """Names that were meant to be found: no submodules, no private ones, no imports of typing."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not (isinstance(value, type(sys)) or getattr(value, "__module__", "") == "typing")
        and getattr(value, "__module__", module.__name__).startswith("gradpost")
    }


def test_exports_are_all():
    assert public(gradpost) == set(gradpost.__all__) - {"__version__"}
    assert list(gradpost.__all__) == sorted(gradpost.__all__)
    assert all(hasattr(gradpost, name) for name in gradpost.__all__)
    assert public(gradpost.protocol) == set(gradpost.protocol.__all__)


def test_summaries_pickle():
    fields = dict.fromkeys(gradpost.Summary.__dataclass_fields__, 1)
    summary = gradpost.Summary.of({**fields, "new": 2})
    assert pickle.loads(pickle.dumps(summary)) == summary


def test_importing_it_imports_no_server():
    code = (
        "import sys, gradpost\n"
        "print(sorted({'service', 'kernels', 'numba', 'fastapi', 'pydantic'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_wheel_holds_gradpost_only(tmp_path):
    source = tmp_path / "client"  # building writes beside the sources
    shutil.copytree(CLIENT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(CLIENT / name, source)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"),
            *("--no-build-isolation", "--disable-pip-version-check", "-w", str(tmp_path), source),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"gradpost-{gradpost.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    meta = f"gradpost-{gradpost.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"gradpost", meta}
    modules = {
        str(path.relative_to(CLIENT / "src")) for path in CLIENT.glob("src/gradpost/**/*.py")
    }
    assert {name for name in names if name.startswith("gradpost/")} == {
        *modules,
        "gradpost/py.typed",
    }
