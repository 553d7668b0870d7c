from hypothesis import given
from hypothesis import strategies as st

from service.sessions.changes import KEPT, Changes


def test_nothing_is_known_at_first() -> None:
    changes = Changes()
    assert changes.since((1, 1), (1, 2)) is None
    assert changes.since((1, 2), (1, 2)) == frozenset()


def test_spans_are_joined() -> None:
    changes = Changes()
    changes.note(1, 2, [(0, 2), (2, 3), (5, 6)])
    changes.note(1, 3, [(4, 5)])
    assert changes._last[0].spans == ((0, 3), (5, 6))
    assert changes.since((1, 1), (1, 3)) == {0, 1, 2, 4, 5}
    assert changes.since((1, 1), (1, 2)) == {0, 1, 2, 5}
    assert changes.since((1, 2), (1, 3)) == {4}


def test_a_gap_ends_what_is_known() -> None:
    changes = Changes()
    changes.note(1, 2, [(0, 1)])
    changes.note(1, 4, [(1, 2)])
    assert changes.since((1, 1), (1, 4)) is None
    assert changes.since((1, 2), (1, 4)) is None
    assert changes.since((1, 3), (1, 4)) == {1}
    assert changes.since((1, 3), (1, 5)) is None  # 1-5 was not noted


def test_an_epoch_ends_what_is_known() -> None:
    changes = Changes()
    changes.note(1, 2, [(0, 1)])
    changes.note(2, 3, [(1, 2)])
    assert changes.since((1, 2), (2, 3)) is None
    assert changes.since((2, 2), (2, 3)) == {1}
    assert changes.since((2, 4), (2, 3)) is None


@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), max_size=KEPT + 20),
    st.integers(0, KEPT + 20),
)
def test_it_is_the_union_or_nothing(updates: list[list[bool]], back: int) -> None:
    changes = Changes()
    for version, present in enumerate(updates, 2):
        changes.note(1, version, [(at, at + 1) for at, came in enumerate(present) if came])
    now = len(updates) + 1
    base = max(1, now - back)
    found = changes.since((1, base), (1, now))
    if now - base > KEPT:
        assert found is None
    else:
        assert found == {at for one in updates[base - 1 :] for at in range(5) if one[at]}
