"""`application/json`: tensors as nested lists, for `curl` and browsers.

Strict on the way in (RFC 8259 and no more: no NaN, no duplicate keys, bounded nesting), exact on
the way out: every number is the shortest text that reads back as the same value. JSON has no word
for the dtype, so numbers are read into the session's; and nested lists can not spell every empty
shape, so `[]` stands for any empty tensor.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from math import prod
from typing import Any, NoReturn

import numpy as np

from gradpost.protocol import SAFETENSORS
from gradpost.protocol.dtypes import NUMPY, from_bf16
from service.errors import BodyTooLarge, InvalidJson, InvalidTensors, Nonfinite, NotAcceptable
from service.wire.fit import check_whole, select
from service.wire.reader import MAX_DIMS, EntryLike, Flat, LayoutLike
from service.wire.rows import ALL, Given, Rows, Taking, check_range, check_shape, kept, put

MAX_DEPTH = 64
"""Nesting of a document, objects and lists together."""
MAX_ELEMENTS = 100_000
"""Numbers in one body, either way, where the caller has no other limit."""
MAX_BYTES = 4 << 20
"""Bytes of one answer, where the caller has no other limit."""
MAX_NAME = 1024
"""Characters of a tensor's name."""

Tensor = tuple[str, tuple[int, ...], Flat]
"""Name, shape, and the values in C order: master[prod(shape)]."""

# The quantifiers are possessive and an unclosed string matches to the end: linear on any input.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_NUMBERS = {int, float}
_WORDS = {str: "text", bool: "true or false", type(None): "null", dict: "an object", list: "a list"}


def loads(body: bytes) -> Any:
    """Parses a JSON document strictly.

    Args:
        body: UTF-8, with nesting of at most 64.

    Returns:
        dict, list, str, int, float, bool or None. A number like 1e999 is an infinite float: the
        field it stands in refuses it.

    Raises:
        InvalidJson: Not JSON, nested too deep, a key given twice, NaN or Infinity, an integer of
            more than 4,300 digits, not UTF-8.
    """
    _check_depth(body)
    try:
        return json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise InvalidJson(f"The body is not UTF-8 at byte {error.start}; encode it so.") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "send a complete JSON document."
        ) from None
    except ValueError:  # int() refuses more than sys.get_int_max_str_digits()
        raise InvalidJson(
            "An integer in the body has too many digits; write large numbers like 1e30."
        ) from None


def tensors(obj: object, master: str, limit: int = MAX_ELEMENTS) -> list[Tensor]:
    """Reads a mapping of names to nested lists (or to single numbers: scalars).

    Args:
        obj: As `loads` gives it.
        master: The session's dtype, "F32" or "F64": what the numbers are read into.
        limit: Numbers that all tensors together may hold.

    Returns:
        In the order of the document.

    Raises:
        InvalidTensors: Not a mapping; a bad name; ragged, too deep, or not numbers.
        Nonfinite: A number that overflows the session's dtype.
        BodyTooLarge: More than `limit` numbers, or tensors.
    """
    if not isinstance(obj, dict):
        raise InvalidTensors(
            f"Tensors come as an object of names and nested lists, and this is {_word(obj)}; "
            'send {"w": [[0.1, 0.2]], "b": [0.0]}.'
        )
    if len(obj) > limit:  # each costs memory and time, even one that holds no number
        raise BodyTooLarge(
            f"{len(obj)} tensors are more than the {limit} numbers that JSON may hold here; send "
            f"them as {SAFETENSORS}.",
            limit=limit,
        )
    read: list[Tensor] = []
    left = limit
    for name, value in obj.items():
        _check_name(name)
        shape, leaves = _flattened(name, value, left, limit)
        left -= len(leaves)
        read.append((name, shape, _numbers(name, leaves, master)))
    return read


def gradients(
    obj: object, master: str, limit: int = MAX_ELEMENTS
) -> tuple[list[Tensor], list[Given]]:
    """As `tensors`, and {"idx": [..], "rows": [[..]]} for some rows of a tensor.

    Args:
        obj: As `loads` gives it.
        master: As for `tensors`.
        limit: Numbers, indices included, that all together may hold.

    Returns:
        Those that came whole, and those of which rows came.

    Raises:
        ServiceError: As `tensors`.
    """
    if not isinstance(obj, dict) or len(obj) > limit:
        return tensors(obj, master, limit), []  # refused
    came = tensors({k: v for k, v in obj.items() if not isinstance(v, dict)}, master, limit)
    left = limit - sum(values.size for _, _, values in came)
    some: list[Given] = []
    for name, value in obj.items():
        if isinstance(value, dict):
            some.append(_some_rows(name, value, master, left, limit))
            left -= some[-1].idx.size + some[-1].values.size
    return came, some


def _some_rows(name: str, value: dict[str, Any], master: str, left: int, limit: int) -> Given:
    """Rows of one tensor."""
    _check_name(name)
    if value.keys() != {"idx", "rows"}:
        raise InvalidTensors(
            f"{name[:80]!a} is an object; a tensor is nested lists of numbers, or "
            '{"idx": [row numbers], "rows": [their values]}.',
            name=name[:200],
        )
    dims, indices = _flattened(name, value["idx"], left, limit)
    wrong = [one for one in indices if type(one) is not int or not -1 < one < 1 << 63]
    if len(dims) != 1 or wrong:
        raise InvalidTensors(
            f"idx of {name[:80]!a} must be a list of row numbers, whole ones from 0.",
            name=name[:200],
        )
    shape, leaves = _flattened(name, value["rows"], left - len(indices), limit)
    values = _numbers(name, leaves, master)
    return Given(name, np.array(indices, np.int64), shape, values, master)


def fill(
    layout: LayoutLike,
    came: Sequence[Tensor],
    dest: Flat,
    taking: Taking = ALL,
    some: Sequence[Given] = (),
) -> tuple[Rows, ...]:
    """Puts a set of tensors into a flat vector, in layout order; zeros where none came.

    Args:
        layout: The session's tensors; those that came must have their shapes.
        came: As `tensors` gives it.
        dest: master[layout.size], written in place once everything has been checked.
        taking: What the session says to what comes.
        some: Rows of other tensors.

    Returns:
        The rows of tensors that are taken lazily, whose places in `dest` are not defined.

    Raises:
        TensorMismatch: Missing, unexpected or misshapen tensors.
        InvalidTensors: An index that no row has.
        ServiceError: Whatever `taking` refuses.
    """
    index = layout.index
    shapes = {given.name: index[given.name].shape if given.name in index else () for given in some}
    shapes.update((name, shape) for name, shape, _ in came)
    check_whole(layout, shapes, fits, taking.may_miss)
    for given in some:
        _check_rows(index[given.name], given)
        taking.check_rows(index[given.name])
    if len(came) < len(layout.entries):
        dest[:] = 0
    for name, _, values in came:
        entry = index[name]
        dest[entry.offset : entry.offset + entry.size] = values
    lazy: list[Rows] = []
    for given in some:
        entry = index[given.name]
        if taking.lazy(entry):
            at = layout.entries.index(entry)
            lazy.append(kept(given, at, entry, given.dtype))
        else:
            put(given, entry, dest[entry.offset : entry.offset + entry.size])
    return tuple(lazy)


def _check_rows(entry: EntryLike, given: Given) -> None:
    expected = (given.idx.size, *entry.shape[1:])
    check_shape(entry, given.idx.shape, given.shape, fits=_stands_for(given.shape, expected))
    check_range(entry.name, given.idx, entry.shape[0], "rows")


def fits(entry: EntryLike, shape: tuple[int, ...]) -> bool:
    """Whether nested lists of a shape may stand for a tensor."""
    return _stands_for(shape, entry.shape)


def _stands_for(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether nested lists of a shape may stand for one of the expected shape.

    Lists say nothing of the dimensions behind an empty one: (2, 0, 3) comes as [[], []], and []
    may stand for any tensor of no elements.
    """
    if expected == shape:
        return True
    if prod(expected):
        return False
    return shape in ((0,), expected[: expected.index(0) + 1])


def render(
    layout: LayoutLike,
    flat: Flat,
    names: Iterable[str] | None = None,
    *,
    max_elements: int = MAX_ELEMENTS,
    max_bytes: int = MAX_BYTES,
) -> bytes:
    """The named tensors (all: None) as a JSON object of nested lists, in layout order.

    Args:
        layout: Where the tensors lie.
        flat: The vector: float64, float32, float16, or uint16 for BF16.
        names: Which tensors.
        max_elements: Numbers that they may hold.
        max_bytes: Bytes that the object may have.

    Raises:
        TensorMismatch: A name that the session does not have.
        NotAcceptable: As `render_tensors`.
    """
    return render_tensors(
        [(e.name, e.shape, flat[e.offset : e.offset + e.size]) for e in select(layout, names)],
        max_elements=max_elements,
        max_bytes=max_bytes,
    )


def render_tensors(
    pieces: Sequence[Tensor], *, max_elements: int = MAX_ELEMENTS, max_bytes: int = MAX_BYTES
) -> bytes:
    """Tensors as a JSON object of nested lists; each may have its own dtype (BF16 as uint16).

    Args:
        pieces: The tensors.
        max_elements: Numbers that they may hold.
        max_bytes: Bytes that the object may have.

    Raises:
        NotAcceptable: More numbers or bytes than that, or a value that is not finite.
    """
    _check_small(pieces, max_elements)
    said = (f"{json.dumps(name)}:{_nested(name, shape, flat)}" for name, shape, flat in pieces)
    body = ("{" + ",".join(said) + "}").encode("ascii")
    if len(body) > max_bytes:
        raise NotAcceptable(
            f"As JSON this answer has {len(body)} bytes, above {max_bytes}; ask for it with "
            f"'Accept: {SAFETENSORS}'.",
            available=[SAFETENSORS],
        )
    return body


def _check_depth(body: bytes) -> None:
    """Refuses nesting that the parser would take recursion for."""
    brackets = _STRINGS.sub(b"", body).translate(None, _NO_BRACKETS)
    if len(brackets) <= MAX_DEPTH:
        return
    codes = np.frombuffer(brackets, np.uint8)
    steps = np.where((codes == ord("[")) | (codes == ord("{")), 1, -1)
    if int(np.cumsum(steps).max()) > MAX_DEPTH:
        raise InvalidJson(
            f"The body is nested deeper than {MAX_DEPTH} levels; flatten it (tensors have at most "
            f"{MAX_DIMS} dimensions)."
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys must differ."""
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise InvalidJson(f"The key {twice[:80]!a} is given twice; give each key once.")
    return found


def _no_constant(word: str) -> NoReturn:
    """Refuses NaN and Infinity, which Python would read and JSON does not have."""
    raise InvalidJson(f"{word} is not JSON; every number must be finite.")


def _check_name(name: str) -> None:
    """Refuses names that the other forms could not carry."""
    bad = not name or len(name) > MAX_NAME or "\0" in name or name == "__metadata__"
    if bad or not _encodable(name):
        raise InvalidTensors(
            f"{name[:80]!a} can not name a tensor; use 1 to {MAX_NAME} characters of Unicode "
            "without NUL, and not __metadata__."
        )


def _encodable(name: str) -> bool:
    """Whether a name has a form in UTF-8: JSON can spell half a surrogate pair."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _word(value: object) -> str:
    """What a JSON value is called in a message."""
    return _WORDS.get(type(value), "a number")


def _flattened(
    name: str, value: object, left: int, limit: int
) -> tuple[tuple[int, ...], Sequence[int | float]]:
    """The shape of nested lists and their numbers in C order, level by level (no recursion)."""
    shape: list[int] = []
    level: list[Any] = [value]
    while level:
        kinds = set(map(type, level))
        if kinds <= _NUMBERS:
            break
        if kinds != {list}:
            raise _not_numbers(name, kinds)
        lengths = set(map(len, level))
        if len(lengths) > 1:
            raise _ragged(name, f"lists of {min(lengths)} and of {max(lengths)} items")
        if len(shape) == MAX_DIMS:
            raise InvalidTensors(
                f"{name[:80]!a} is nested deeper than {MAX_DIMS} dimensions; reshape it."
            )
        shape.append(lengths.pop())
        level = list(chain.from_iterable(level))
    if len(level) > left:
        raise BodyTooLarge(
            f"A JSON body may hold {limit} numbers and this one has more; send tensors as "
            f"{SAFETENSORS}.",
            limit=limit,
        )
    return tuple(shape), level


def _not_numbers(name: str, kinds: set[type]) -> InvalidTensors:
    """The refusal of leaves that are not numbers."""
    words = sorted({_WORDS.get(kind, "a number") for kind in kinds})
    if kinds <= _NUMBERS | {list}:
        return _ragged(name, "numbers and lists side by side")
    wrong = [word for word in words if word not in ("a number", "a list")]
    return InvalidTensors(
        f"{name[:80]!a} holds {' and '.join(wrong)}; a tensor is nested lists of numbers.",
        name=name[:200],
    )


def _ragged(name: str, what: str) -> InvalidTensors:
    """The refusal of lists that make no rectangular tensor."""
    return InvalidTensors(
        f"{name[:80]!a} has {what} on one level; make the lists of a level equally long.",
        name=name[:200],
    )


def _numbers(name: str, leaves: Sequence[int | float], master: str) -> Flat:
    """Numbers as an array of the master dtype."""
    try:
        wide = np.array(leaves, np.float64)
    except OverflowError:  # an integer above 1.8e308
        position = next(i for i, leaf in enumerate(leaves) if _overflows(leaf))
        raise _too_large(name, position, master) from None
    with np.errstate(over="ignore", under="ignore"):
        values = wide.astype(NUMPY[master], copy=False)
    finite = np.isfinite(values)
    if not finite.all():
        raise _too_large(name, int(np.argmin(finite)), master)
    return values


def _overflows(leaf: int | float) -> bool:
    """Whether a number has no finite double."""
    try:
        float(leaf)
    except OverflowError:
        return True
    return False


def _too_large(name: str, position: int, master: str) -> Nonfinite:
    """The refusal of a number that the session's dtype can not hold."""
    return Nonfinite(
        f"{name[:80]!a} has a number at flat index {position} that overflows {master}; scale "
        "the values down.",
        tensor=name[:200],
        index=position,
    )


def _check_small(pieces: Iterable[Tensor], limit: int) -> None:
    """Refuses to write what is too long for JSON, before a character of it is made."""
    count = 0
    for _, shape, flat in pieces:
        # Lists count like numbers: a shape (10**18, 0) has no elements and that many lists.
        count += max(flat.size, *(prod(shape[:k]) for k in range(1, len(shape))), 0)
    if count > limit:
        raise NotAcceptable(
            f"JSON answers hold at most {limit} numbers and this one has {count}; ask for it with "
            f"'Accept: {SAFETENSORS}'.",
            available=[SAFETENSORS],
        )


def _nested(name: str, shape: tuple[int, ...], flat: Flat) -> str:
    """One tensor as nested lists: joined from the innermost dimension outward."""
    items = _texts(name, flat)
    for axis in range(len(shape) - 1, -1, -1):
        source: Iterator[str] = iter(items)
        length = shape[axis]
        items = [f"[{','.join(islice(source, length))}]" for _ in range(prod(shape[:axis]))]
    return items[0]


def _texts(name: str, flat: Flat) -> list[str]:
    """Each value as the shortest text that reads back as the same value of its dtype."""
    if flat.dtype == np.uint16:
        flat = from_bf16(flat)
    finite = np.isfinite(flat)
    if not finite.all():
        raise NotAcceptable(
            f"{name[:80]!a} is not finite at flat index {int(np.argmin(finite))}, and JSON "
            f"can not say that; ask for it with 'Accept: {SAFETENSORS}'.",
            available=[SAFETENSORS],
        )
    if flat.dtype == np.float64:
        return list(map(repr, flat.tolist()))
    texts = list(map(str, flat))
    # A parser reads a double and rounds it again. Where that would miss, say the double itself.
    with np.errstate(over="ignore", under="ignore"):
        back = np.array(list(map(float, texts)), np.float64).astype(flat.dtype)
    for position in np.flatnonzero(back != flat):
        texts[position] = repr(float(flat[position]))
    return texts
