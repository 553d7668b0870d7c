import pytest

from tests.storage.counter import Scratch


@pytest.fixture
def scratch():
    with Scratch() as path:
        yield path
