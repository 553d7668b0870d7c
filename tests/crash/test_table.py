import pytest

from tests.crash.history import Kill
from tests.crash.table import Table, replaced
from tests.crash.violation import BITS, LOST, Violation

PAGE = "x\n<!-- crash table -->\nold\n<!-- /crash table -->\ny\n"


class Report:
    kills = (Kill(1.0, "run:a.after"), Kill(2.0, "start:b.after"), Kill(3.0, "run:a.before"))
    violations = (Violation(LOST, "keys", "a", 2.5, ""), Violation(BITS, "bits", "a", 9.0, ""))


def test_kills_and_what_came_of_them_are_counted_by_place():
    table = Table()
    table.add(Report)
    assert str(table).splitlines()[2:] == [
        "| `start:b` after | 1 | 1 | 0 | 0 |",
        "| `run:a` before, after | 2 | 0 | 0 | 1 |",
        "| all | 3 | 1 | 0 | 1 |",
    ]


def test_a_page_takes_it_between_its_marks():
    once = replaced(PAGE, "new")
    assert once == PAGE.replace("old", "new")
    assert replaced(once, "new") == once


@pytest.mark.parametrize("page", ["x", PAGE + PAGE, "<!-- /crash table --><!-- crash table -->"])
def test_a_page_without_its_marks_is_left_alone(page):
    with pytest.raises(ValueError, match="needs one"):
        replaced(page, "new")
