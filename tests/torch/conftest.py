"""A server in process and optimizers on it. Imports no torch: the ordinary run reads this file."""

import os

import pytest

from gradpost import InProcess
from service.app import create_app
from service.settings import Settings

# These need torch, which the ordinary run does not install: `make test-torch` sets the variable.
collect_ignore_glob = [] if os.environ.get("GRADPOST_TEST_TORCH") == "1" else ["test_*.py"]


class Shared:
    """A transport that optimizers may close and others go on with."""

    def __init__(self, transport):
        self._transport = transport

    def request(self, *arguments):
        return self._transport.request(*arguments)

    def close(self):
        pass


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "data"
    settings = Settings(
        threads=2, warm_rules=(), log_level="error", memory_bytes=1 << 28, data_dir=folder
    )
    with InProcess(create_app(settings)) as transport:
        yield Shared(transport)


@pytest.fixture
def remote(server):
    """Makes optimizers on the server in process; their sessions end with the test."""
    from gradpost.torch import RemoteOptimizer

    made = []

    def make(params, rule="adam", *, transport=server, **options):
        made.append(RemoteOptimizer(params, transport, rule=rule, **options))
        return made[-1]

    yield make
    for optimizer in made:
        optimizer.session.close()
    from gradpost import Session

    for name in {optimizer.session.id for optimizer in made}:
        Session(server, name).delete()
