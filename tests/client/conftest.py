"""One server process on TCP, one with a key on a Unix socket, and one application in process."""

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from gradpost import InProcess
from service.app import create_app
from service.settings import Settings

ROOT = Path(__file__).parents[2]
KEY = "a-key-for-tests"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in list(os.environ):
        if name.startswith("GRADPOST_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@contextmanager
def serving(*arguments, **settings):
    """A server process; yields the line that says where it listens."""
    env = {name: text for name, text in os.environ.items() if not name.startswith("GRADPOST_")}
    env |= {"GRADPOST_WARM_RULES": "", "GRADPOST_LOG_LEVEL": "error", **settings}
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="session")
def url():
    """Of a server process without a key."""
    with serving("--port", "0") as line:
        yield line.rpartition(" ")[2]


@pytest.fixture(scope="session")
def locked():
    """Of a server process with KEY, on a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="gradpost") as folder:
        path = f"{folder}/s.sock"
        with serving("--uds", path, GRADPOST_API_KEY=KEY) as line:
            assert line.endswith(path)
            yield f"http+unix://{path}"


class Shared:
    """A transport that sessions may close and others go on with."""

    def __init__(self, transport):
        self._transport = transport

    def request(self, *arguments):
        return self._transport.request(*arguments)

    def close(self):
        pass


@pytest.fixture(scope="session")
def application():
    settings = Settings(threads=2, warm_rules=(), log_level="error", memory_bytes=1 << 28)
    with InProcess(create_app(settings)) as transport:
        yield Shared(transport)


@pytest.fixture(params=["http", "in process"])
def server(request):
    """What Session.create takes as url: a real server, then the application in process."""
    return request.getfixturevalue("url" if request.param == "http" else "application")
