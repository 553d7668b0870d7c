"""The bytes of a ring file: one preamble, pages of records without payload, slots with payload.

```
offset 0                     preamble, one page
PAGE * (1 + i)               record page i of `records`: a header whose record has no payload
PAGE * (1 + records) + ...   slot j of `slots`: a header, then `capacity` bytes of payload, padded
                             to whole pages
```

All numbers are little-endian. A page is 4096 bytes, written whole, zeros behind its end. The
checksum is xxh3_64 over the whole page with the checksum's own bytes zero, so that a page of which
some 512-byte sectors are old and some are new is none.

Preamble:

```
 0   8  magic "GRADRING"           32  4  slots
 8   4  format                     36  4  records
12   4  zeros                      40  8  capacity, bytes
16  16  session                    48  8  checksum
```

Header of a record:

```
 0   8  magic "GRADRCRD"           56  16  digest of the push, the session layer's own
 8   4  format                     72  16  xxh3_128 of the payload
12   1  kind                       88   8  length of the payload
13   1  zero                       96   4  length of the meta
14   2  length of the worker id;  100   4  zeros
        0: the record has no key  104   8  checksum
16  16  session                   112      worker id, UTF-8, then the meta
32   8  number
40   8  synced
48   8  sequence
```

`session` is the incarnation's UUID. Records are numbered from 1 without gaps. `synced` is the last
record that was durable when this header was written: records of one group commit carry the same.
A missing record above it may never have been durable; one at or below it was acknowledged, and its
absence is damage. A page of zeros has never been used.
"""

import struct
from enum import Enum, IntEnum
from typing import Any, NamedTuple

import xxhash

from service.storage.files import Bytes

PAGE = 4096
FORMAT = 1
_PREAMBLE = struct.Struct("<8sI4x16sIIQQ")
_HEADER = struct.Struct("<8sIBxH16sQQQ16s16sQI4xQ")
_CHECKSUM = struct.Struct("<Q")
assert _PREAMBLE.size == 56
assert _HEADER.size == 112

WORKER_BYTES = 255
META_BYTES = PAGE - _HEADER.size - WORKER_BYTES
"""Bytes of meta that fit beside any worker id; a longer one travels in the payload."""
NO_DIGEST = bytes(16)
_RING, _RECORD = b"GRADRING", b"GRADRCRD"


class Kind(IntEnum):
    """What a record is; the session layer gives them their meaning. Numbers are on the disk."""

    PUSH = 1
    CONTRIBUTION = 2
    ROUND_CLOSE = 3
    SKIP = 4
    PATCH = 5
    GROUPS = 6
    PARAMS = 7
    STATE = 8
    RESTORE = 9
    DELETE = 10


_KINDS = frozenset(Kind)


class Key(NamedTuple):
    """What identifies a push."""

    worker: str
    sequence: int


class Shape(NamedTuple):
    """How a ring is laid out.

    Attributes:
        slots: Records with payload that it holds.
        capacity: Bytes of the longest payload.
        records: Records without payload that it holds.
    """

    slots: int
    capacity: int
    records: int

    @property
    def stride(self) -> int:
        """Bytes from one slot to the next."""
        return PAGE + -(-self.capacity // PAGE) * PAGE

    @property
    def places(self) -> int:
        """Record pages and slots."""
        return self.records + self.slots

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.offset(self.places)

    def offset(self, place: int) -> int:
        """Where the header of a place lies: record pages first, then slots."""
        into = max(place - self.records, 0)
        return PAGE * (1 + min(place, self.records)) + into * self.stride


class Header(NamedTuple):
    """A record, without its payload."""

    session: bytes
    number: int
    synced: int
    kind: Kind
    key: Key | None
    digest: bytes
    payload_digest: bytes
    length: int
    meta: bytes


class Page(Enum):
    """A page that holds no record."""

    BLANK = "was never used"
    TORN = "is unreadable"
    NEWER = "is of a newer format"


def tail(key: Key | None, meta: bytes) -> tuple[bytes, bytes]:
    """The encoded worker id, empty without a key, and what follows the fixed fields.

    Raises:
        ValueError: Worker id or meta has a length that a header can't hold.
    """
    worker = b"" if key is None else key.worker.encode()
    if len(worker) > WORKER_BYTES or (key is not None and not worker):
        raise ValueError(f"a worker id has 1 to {WORKER_BYTES} bytes, not {len(worker)}")
    if len(meta) > META_BYTES:
        raise ValueError(f"the meta has {len(meta)} bytes and {META_BYTES} fit")
    return worker, worker + meta


def pack(header: Header) -> bytes:
    """The page of a header.

    Raises:
        ValueError: As `tail`.
    """
    worker, rest = tail(header.key, header.meta)
    fixed = (
        _RECORD, FORMAT, header.kind, len(worker), header.session, header.number, header.synced,
        0 if header.key is None else header.key.sequence, header.digest, header.payload_digest,
        header.length, len(header.meta),
    )  # fmt: skip
    return _sealed(_HEADER, fixed, rest)


def parse(page: Bytes) -> Header | Page:
    """The header of a page, or what it is instead."""
    data = bytes(page)
    if data == bytes(PAGE):
        return Page.BLANK
    fixed = _unsealed(_HEADER, data)
    if fixed is None or fixed[0] != _RECORD:
        return Page.TORN
    if fixed[1] != FORMAT or fixed[2] not in _KINDS:
        return Page.NEWER
    kind, worker, session, number, synced, sequence, digest, payload_digest, length, meta = fixed[
        2:
    ]
    rest = data[_HEADER.size :]
    key = Key(rest[:worker].decode(), sequence) if worker else None
    return Header(
        session, number, synced, Kind(kind), key, digest, payload_digest, length,
        rest[worker : worker + meta],
    )  # fmt: skip


def pack_preamble(session: bytes, shape: Shape) -> bytes:
    """The first page of a ring file."""
    fixed = (_RING, FORMAT, session, shape.slots, shape.records, shape.capacity)
    return _sealed(_PREAMBLE, fixed, b"")


def parse_preamble(page: Bytes) -> tuple[bytes, Shape] | Page:
    """The session and shape of a ring file, or what the page is instead."""
    fixed = _unsealed(_PREAMBLE, bytes(page))
    if fixed is None or fixed[0] != _RING:
        return Page.TORN
    if fixed[1] != FORMAT:
        return Page.NEWER
    _, _, session, slots, records, capacity = fixed
    return session, Shape(slots, capacity, records)


def _sealed(layout: struct.Struct, fixed: tuple[Any, ...], rest: bytes) -> bytes:
    """A page with its checksum, which is the last of the fixed fields."""
    page = bytearray((layout.pack(*fixed, 0) + rest).ljust(PAGE, b"\0"))
    _CHECKSUM.pack_into(page, layout.size - _CHECKSUM.size, xxhash.xxh3_64_intdigest(page))
    return bytes(page)


def _unsealed(layout: struct.Struct, page: bytes) -> tuple[Any, ...] | None:
    """The fixed fields without the checksum; None if it is not right."""
    if len(page) != PAGE:
        return None
    *fixed, checksum = layout.unpack_from(page)
    bare = bytearray(page)
    _CHECKSUM.pack_into(bare, layout.size - _CHECKSUM.size, 0)
    return tuple(fixed) if xxhash.xxh3_64_intdigest(bare) == checksum else None
