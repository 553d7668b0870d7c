"""Runs against the plain picture: one count for each tensor."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from service.sessions import runs
from service.sessions.layout import Layout

SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=8)


def layout_of(sizes, groups):
    return Layout.of([(f"t{k}", "F32", (size,)) for k, size in enumerate(sizes)], groups)


@st.composite
def layouts(draw):
    sizes = draw(SIZES)
    groups = draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    return layout_of(sizes, groups), sizes, groups


@given(layouts())
def test_a_layout_is_packed_group_by_group_in_order_of_upload(made):
    layout, sizes, groups = made
    order = [f"t{k}" for group in range(3) for k, mine in enumerate(groups) if mine == group]
    assert [entry.name for entry in layout.entries] == order
    at = 0
    for entry in layout.entries:
        assert entry.offset == at
        assert entry.group == groups[int(entry.name[1:])]
        at += entry.size
    assert at == layout.size == sum(sizes)
    flat = [entry for entry in layout.entries for _ in range(entry.size)]
    for position, entry in enumerate(flat):
        assert layout.name_at(position) == (entry.name, position - entry.offset)
    ends = [layout.span(group) for group in range(3)]
    assert [e for span in ends for e in layout.entries[span.first : span.last]] == [*layout.entries]
    assert [ends[0].lo, *[span.hi for span in ends]] == [
        0, ends[1].lo, ends[2].lo, layout.size,
    ]  # fmt: skip


@given(layouts(), st.data())
def test_runs_follow_the_counts_of_every_tensor_and_are_as_few_as_can_be(made, data):
    layout, *_ = made
    entries = layout.entries
    counts = [0] * len(entries)
    groups = [runs.whole(layout.span(group)) for group in range(3)]
    pushes = data.draw(
        st.lists(st.lists(st.booleans(), min_size=len(entries), max_size=len(entries)), max_size=6)
    )
    for present in pushes:
        for index, mine in enumerate(groups):
            pieces = runs.cut(mine, present, entries)
            groups[index] = runs.joined(
                [run._replace(updates=run.updates + came) for run, came in pieces]
            )
        counts = [count + came for count, came in zip(counts, present, strict=True)]
    for group, mine in enumerate(groups):
        span = layout.span(group)
        seen = [run.updates for run in mine for _ in range(run.first, run.last)]
        assert seen == counts[span.first : span.last]
        changes = sum(a != b for a, b in itertools.pairwise(seen))
        assert len(mine) == (changes + 1 if seen else 0)
        for run in mine:
            inside = entries[run.first : run.last]
            assert (run.lo, run.hi) == (inside[0].offset, inside[-1].offset + inside[-1].size)
        scalars = [()] * len(entries)
        assert runs.of(span, entries, counts, scalars) == mine


@given(layouts(), SIZES)
def test_an_extended_layout_leaves_what_was_where_it_was(made, more):
    layout, *_ = made
    grown = layout.extended([(f"n{k}", "F32", (size,)) for k, size in enumerate(more)], 3)
    assert grown.entries[: len(layout.entries)] == layout.entries
    assert grown.size == layout.size + sum(more)
    span = grown.span(3)
    assert (span.lo, span.hi) == (layout.size, grown.size)
