"""Every curl of docs/protocol.md, run in its order against a real server."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CURL = shutil.which("curl")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRADPOST_")}
    environment |= {"GRADPOST_PORT": str(port), "GRADPOST_LOG_LEVEL": "warning"}
    environment["GRADPOST_DATA_DIR"] = str(tmp_path_factory.mktemp("server") / "data")
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve"], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health/ready", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < end, "not ready"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        output = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert b"Traceback" not in output[0] + output[1]


def calls(text):
    """(expected status, command) of each call of the page."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for part in re.split(r"^# (?=\d{3}$)", block, flags=re.M)[1:]:
            status, _, command = part.partition("\n")
            yield int(status), command.strip()


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_every_call_of_the_page(url, tmp_path):
    found = list(calls((ROOT / "docs" / "protocol.md").read_text()))
    assert len(found) > 25
    environment = {**os.environ, "U": url}
    for status, command in found:
        script = command.replace("curl ", "curl -sS -D headers ", 1)
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
        lines = (tmp_path / "headers").read_text().splitlines()
        statuses = [line.split()[1] for line in lines if line.startswith("HTTP/")]
        assert statuses[-1] == str(status), (command, done.stdout)


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_the_curl_lines_of_the_readme(url, tmp_path):
    text = (ROOT / "README.md").read_text()
    blocks = [b for b in re.findall(r"```sh\n(.*?)```", text, re.S) if "curl -X" in b]
    assert blocks
    for block in blocks:
        script = block.replace("localhost:8000", url).replace("curl -X", "curl -sS --fail -X")
        done = subprocess.run(
            ["bash", "-ec", script], cwd=tmp_path, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, (block, done.stderr)
        assert b'"params"' in done.stdout


def test_every_route_stands_on_the_page():
    text = (ROOT / "docs" / "protocol.md").read_text()
    commands = " ".join(command for _, command in calls(text))
    from service.app import create_app

    for path in create_app().openapi()["paths"]:
        pattern = re.sub(r"\\{[a-z]+\\}", "[a-z0-9-]+", re.escape(path))
        assert re.search(pattern, commands.replace("$U", "")), path
