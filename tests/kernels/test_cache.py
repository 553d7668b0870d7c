import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from kernels import cache

ROOT = Path(cache.__file__).parents[1]
SCRIPT = """
import numpy as np
from kernels import cache, cpu
run = cpu.kernel("sgd", "F32", "F32")
p = np.ones(4, np.float32)
run(p, p, p.copy(), (), np.array([-0.5, 0, 1], np.float32), 0, 4)
hits = sum(sum(d.stats.cache_hits.values()) for d in cache._alive)
print(hits, len(cache._alive), cache.fingerprint(), p[0])
"""


def run(tree: Path, folder: Path) -> list[str]:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=env, cwd=tree, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_second_process_hits_and_an_edit_misses(tmp_path):
    tree, folder = tmp_path / "tree", tmp_path / "cache"
    shutil.copytree(
        ROOT / "kernels", tree / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    cold = run(tree, folder)
    assert cold[:2] == ["0", "2"]
    warm = run(tree, folder)
    assert warm == ["2", *cold[1:]]

    rules = tree / "kernels" / "rules.py"
    text = rules.read_text()
    old = "return (fma(neg_lr, direction(p, g, wd, sign), p),)"
    assert old in text
    rules.write_text(text.replace(old, "return (fma(neg_lr, direction(p, g, wd, sign), g),)"))
    edited = run(tree, folder)
    assert edited[0] == "0"
    assert edited[2] != cold[2]

    rules.write_text(text)
    assert run(tree, folder) == warm


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    tmp_path.chmod(0o500)
    assert run(ROOT, tmp_path / "cache")[0] == "0"


def test_a_failed_save_costs_only_time(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert run(ROOT, blocked)[0] == "0"


def test_folder_is_named_by_content(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert cache.root() == tmp_path
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "gradpost"
    before = cache.fingerprint()
    cache.fingerprint.cache_clear()
    monkeypatch.setattr(numba, "__version__", "0.0")
    assert cache.fingerprint() != before
    cache.fingerprint.cache_clear()
