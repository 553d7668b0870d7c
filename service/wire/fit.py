"""Whether the tensors that came are the tensors of the session."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from service.errors import TensorMismatch
from service.wire.reader import MAX_DIMS, SHOWN, EntryLike, LayoutLike, clipped, listed

Shape = tuple[int, ...]
Same = Callable[[EntryLike, Shape], bool]
MayMiss = Callable[[EntryLike], bool]


def same_shape(entry: EntryLike, shape: Shape) -> bool:
    """Whether a tensor came in exactly the shape it has here."""
    return entry.shape == shape


def none_missing(entry: EntryLike) -> bool:
    """Says that every tensor must come."""
    return False


def check_whole(
    layout: LayoutLike,
    came: Mapping[str, Shape],
    same: Same = same_shape,
    may_miss: MayMiss = none_missing,
) -> None:
    """Requires every tensor of the layout that must come, in its shape, and no other.

    Args:
        layout: The session's tensors.
        came: Shapes by name, as they came.
        same: Decides whether a shape fits.
        may_miss: Tells which tensors may be left out.

    Raises:
        TensorMismatch: Names missing, unexpected or misshapen, all of them at once.
    """
    index = layout.index
    if not came:
        raise TensorMismatch(
            "The push holds no tensors; send every tensor of the session.",
            missing=clipped(list(index)),
            missing_count=len(index),
        )
    misshapen = []
    unexpected = []
    for name, shape in came.items():
        entry = index.get(name)
        if entry is None:
            unexpected.append(name)
        elif not same(entry, shape):
            misshapen.append(name)
    missing = []
    if unexpected or len(came) < len(index):
        missing = [n for n, entry in index.items() if n not in came and not may_miss(entry)]
    if unexpected or missing or misshapen:
        raise _mismatch(index, came, missing, unexpected, misshapen)


def presence(layout: LayoutLike, came: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """For each entry of the layout, whether it came; None: all did."""
    if len(came) == len(layout.entries):
        return None
    return tuple(entry.name in came for entry in layout.entries)


def select(layout: LayoutLike, names: Iterable[str] | None) -> Sequence[EntryLike]:
    """The entries of the named tensors, in layout order; all of them where `names` is None.

    Raises:
        TensorMismatch: A name that the session does not have.
    """
    if names is None:
        return layout.entries
    wanted = set(names)
    unexpected = sorted(wanted - layout.index.keys())
    if unexpected:
        raise TensorMismatch(
            f"The session has no tensor {listed(unexpected)}; ask for names that its layout lists.",
            unexpected=clipped(unexpected),
            unexpected_count=len(unexpected),
        )
    return [entry for entry in layout.entries if entry.name in wanted]


def _mismatch(
    index: Mapping[str, EntryLike],
    came: Mapping[str, Shape],
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
) -> TensorMismatch:
    """One refusal that names everything that is wrong."""
    said: list[str] = []
    context: dict[str, Any] = {}
    for word, names, advice in (
        ("missing", missing, "send every tensor of the session"),
        ("unexpected", unexpected, "send only names that the layout lists"),
    ):
        if names:
            said.append(f"{word.capitalize()}: {listed(names)}; {advice}.")
            context |= {word: clipped(names), f"{word}_count": len(names)}
    if misshapen:
        shapes = [_shapes(name, index[name].shape, came[name]) for name in misshapen[:SHOWN]]
        first = shapes[0]
        said.append(
            f"Wrong shape: {listed(misshapen)}; the first has shape {first['expected']} here and "
            f"came as {first['got']}; send each tensor in its shape."
        )
        context |= {"misshapen": shapes, "misshapen_count": len(misshapen)}
    return TensorMismatch(" ".join(said), **context)


def _shapes(name: str, expected: Shape, got: Shape) -> dict[str, Any]:
    """One misshapen tensor; a made-up shape may have any number of dimensions."""
    return {"name": name[:200], "expected": list(expected), "got": list(got[: MAX_DIMS + 1])}
