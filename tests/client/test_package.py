"""What `pip install ./client` puts on a trainer's machine."""

import subprocess
import sys
import zipfile
from pathlib import Path

import gradpost

CLIENT = Path(__file__).resolve().parents[2] / "client"


def test_the_only_top_level_name_is_gradpost(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "-w", tmp_path, CLIENT],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"gradpost"}
    assert "gradpost/py.typed" in names
    assert "gradpost/protocol/tensors.py" in names


def test_everything_exported_is_there():
    for name in gradpost.__all__:
        assert hasattr(gradpost, name)
