import pytest

from tests.crash.campaign import reference_server, survey
from tests.crash.fleet import Fleet
from tests.crash.plan import Plan
from tests.crash.points import STOP
from tests.storage.counter import Scratch


@pytest.fixture(scope="session")
def fleet():
    with Scratch() as folder, Fleet(folder) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def reference(fleet):
    with reference_server(fleet) as reference:
        yield reference


@pytest.fixture
def scratch():
    with Scratch() as folder:
        yield folder


@pytest.fixture
def plan(fleet, scratch):
    """A plan that knows what the first server of a folder passes."""
    plan = Plan(seed=1, wanted=lambda point: not point.startswith(f"{STOP}:answer"))
    survey(fleet, scratch / "survey", plan)
    return plan
