"""From the body of a request to arrays: which form it has, how long it may be, where it goes."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from fastapi import Request

from gradpost.protocol import JSON, MAX_HEADER_BYTES, SAFETENSORS
from gradpost.protocol.dtypes import DTYPES, NUMPY
from service.connection import body as stream
from service.errors import InvalidRequest, TensorMismatch, UnsupportedMediaType
from service.limits import Budget
from service.schemas import PushControl, parse_control
from service.schemas.refusals import invalid
from service.sessions import sparse
from service.sessions.arena import Arena, Tensor
from service.sessions.lane import in_pool
from service.sessions.layout import Layout
from service.sessions.pushes import Gradient
from service.sessions.session import Session
from service.wire import body, compact, json, media, raw, safetensors
from service.wire.fit import presence
from service.wire.rows import Taking

T = TypeVar("T")
CHECKPOINT_HEADER = 4 * MAX_HEADER_BYTES
"""Bytes: it names each tensor and all of its state."""
_LOSSY = {"F16": "f16", "BF16": "bf16"}
"""What a summary says of gradient dtypes that no session has."""
SMALL_JSON = 65_536
"""Bytes up to which a JSON body is not reserved, and is parsed on the event loop."""


class Upload(NamedTuple):
    """Tensors of a body, its metadata, and the bytes of the budget that they take."""

    tensors: list[Tensor]
    facts: Mapping[str, Any]
    reserved: int


async def document(request: Request) -> Any:
    """Reads a JSON body within the limit for JSON."""
    media.check_encoding(request.headers.get("content-encoding"))
    kind = media.parse_content_type(request.headers.get("content-type")).kind
    if kind != "json":
        raise UnsupportedMediaType("This call takes application/json.", accepted=[JSON])
    return await _json(request)


async def _json(request: Request) -> Any:
    limit = request.app.state.settings.json_bytes
    budget: Budget = request.app.state.budget
    length = body.content_length(request.headers.get("content-length"), limit)
    with budget.lend(length if length > SMALL_JSON else 0):
        text = await body.collect(stream(request), length, limit)
        return await _aside(request, length, partial(json.loads, text))


async def _aside(request: Request, length: int, work: Callable[[], T]) -> T:
    """What takes milliseconds for a long body, in the pool; a short one is not worth the hop."""
    return work() if length <= SMALL_JSON else await in_pool(request.app.state.pool, work)


async def fields(request: Request, known: tuple[str, ...]) -> dict[str, Any]:
    """Reads a JSON object and refuses members that are not known."""
    found = await _json(request)
    return checked_fields(found, known)


def checked_fields(found: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """The object, if all its members are known.

    Raises:
        InvalidRequest: Not an object, or a member nobody reads.
    """
    if not isinstance(found, dict):
        raise InvalidRequest(
            f"The body must be a JSON object with {', '.join(known)}.",
            errors=[{"field": "", "message": "Send an object."}],
        )
    unknown = sorted(found.keys() - set(known))
    if unknown:
        raise InvalidRequest(
            f"Unknown member {unknown[0][:80]!r}; this body may have {', '.join(known)}.",
            errors=[{"field": name[:80], "message": "Not known here."} for name in unknown[:20]],
        )
    return found


async def gradient(request: Request, session: Session, query: dict[str, str]) -> Gradient:
    """Reads a push into one gradient buffer, in layout order, in its wire dtype.

    What can be refused by the head of the request is refused before the body is read.
    """
    media.check_encoding(request.headers.get("content-encoding"))
    bare = "weight" in query and request.headers.get("content-length") == "0"
    if not bare:
        form = media.parse_content_type(request.headers.get("content-type"))
        if form.kind == "json":
            return await _json_gradient(request, session, query)
    if "overrides" in query:
        query = {**query, "overrides": json.loads(query["overrides"].encode())}
    control = parse_control(query, text=True)
    known = session.precheck(control)
    if control.is_pass != bare:
        raise pass_differs(control)
    if bare:
        return _pass(session, control)
    return await _streamed(request, session, control, form, known=known)


def pass_differs(control: PushControl) -> InvalidRequest:
    """The refusal of a pass with a gradient, or of a weight without one."""
    if control.is_pass:
        return invalid(
            "weight", "A weight of 0 is a pass and has no gradient: leave it out, or weigh it more."
        )
    return invalid("weight", "There is no gradient; only a pass (weight 0) goes without.")


def _pass(session: Session, control: PushControl) -> Gradient:
    session.ready  # noqa: B018 - refuses a session without parameters
    return Gradient(np.empty(0, np.float32), "F32", control, _nothing)


def _nothing() -> None:
    """Gives nothing back: a pass has no buffer."""


def _anything(entry: object) -> bool:
    """Lets any tensor be missing: a repeat is compared with what it repeats, not with the rules."""
    return True


def _taking(session: Session, control: PushControl, *, known: bool) -> Taking:
    """What the session says to the tensors of a push."""
    if known:  # rows stay rows, whatever holds by now: a repeat is compared as it came
        return Taking(_anything, lazy=partial(sparse.has_lazy_form, session))
    terms = session.terms_of(control)
    return Taking(session.may_miss, lambda entry: sparse.check_rows(session, entry, terms))


def _prefix(layout: Layout, size: int) -> Layout:
    """The layout of before a group was added, if a vector of this size was whole then."""
    for count, entry in enumerate(layout.entries, 1):
        if entry.offset + entry.size == size:
            return Layout(layout.entries[:count])
    return layout


async def _streamed(
    request: Request, session: Session, control: PushControl, form: media.Media, *, known: bool
) -> Gradient:
    master = session.spec.dtype
    arena = session.ready
    layout = arena.layout
    length = body.content_length(
        request.headers.get("content-length"), body.largest_push(arena.layout, master)
    )
    taken: list[np.ndarray[Any, Any]] = []

    def acquire(dtype: str) -> np.ndarray[Any, Any]:
        taken.append(arena.gradients.acquire())
        return taken[0][: arena.size * DTYPES[dtype]]

    def release() -> None:
        while taken:
            arena.gradients.release(taken.pop())

    kept = _Kept(request.app.state.budget)
    try:
        if form.kind == "raw":
            assert form.dtype is not None
            if known:
                layout = _prefix(layout, length // DTYPES[form.dtype])
            reader: raw.RawReader | compact.PushReader = raw.raw_reader(
                layout, form.dtype, master, length, acquire
            )
        else:
            taking = _taking(session, control, known=known)
            reader = compact.push_reader(layout, master, length, acquire, kept.keep, taking)
        await body.receive(stream(request), length, reader)
    except BaseException:
        release()
        kept.release()
        raise
    if isinstance(reader, compact.PushReader) and reader.plan is not None:
        return await _decoded(request, arena, control, reader.plan, reader.data, kept)
    dtype = reader.dtype
    assert dtype is not None
    flat = taken[0][: arena.size * DTYPES[dtype]].view(NUMPY[dtype])
    came: Mapping[str, Any] = layout.index
    if isinstance(reader, compact.PushReader):
        came = reader.names
    present = presence(arena.layout, came)
    return Gradient(flat, dtype, control, release, present, wire=_LOSSY.get(dtype))


class _Kept:
    """What a push in small forms holds of the budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held = 0

    def keep(self, plan: compact.Plan) -> np.ndarray[Any, Any]:
        """The memory that a body is kept in."""
        self._budget.borrow(plan.nbytes)
        self._held = plan.nbytes
        return np.empty(plan.data_bytes, np.uint8)

    def release(self, lasting: int = 0) -> None:
        """Gives all of it back, but for so much."""
        self._budget.release(self._held - lasting)
        self._held = lasting


async def _decoded(
    request: Request,
    arena: Arena,
    control: PushControl,
    plan: compact.Plan,
    data: np.ndarray[Any, Any],
    kept: _Kept,
) -> Gradient:
    """The gradient of a body that was kept, in the session's dtype."""
    taken: list[np.ndarray[Any, Any]] = []

    def release() -> None:
        while taken:
            arena.gradients.release(taken.pop())
        kept.release()

    def work() -> Gradient:
        compact.check(plan, data)
        taken.append(arena.gradients.acquire())
        flat = taken[0][: arena.size * DTYPES[plan.master]].view(NUMPY[plan.master])
        found = compact.write(plan, data, flat)
        present = presence(arena.layout, found.came)
        return Gradient(
            flat, plan.master, control, release, present, rows=found.rows, wire=found.wire
        )

    def ended(job: "asyncio.Future[Gradient]") -> None:
        release()
        if not job.cancelled():
            job.exception()  # nobody is left who would ask for it

    job = asyncio.ensure_future(_aside(request, max(data.size, arena.gradients.nbytes), work))
    try:
        gradient = await asyncio.shield(job)
    except asyncio.CancelledError:
        job.add_done_callback(ended)  # until then the pool may be writing
        raise
    except BaseException:
        release()
        raise
    kept.release(plan.lasting)
    return gradient


async def _json_gradient(request: Request, session: Session, query: dict[str, str]) -> Gradient:
    if query:
        raise InvalidRequest(
            f"A JSON push carries {', '.join(sorted(query))[:200]} in its body, not in the query.",
            errors=[{"field": name[:80], "message": "Put it in the body."} for name in query],
        )
    session.check_alive()
    found = await _json(request)
    length = int(request.headers["content-length"])
    passes = isinstance(found, dict) and "weight" in found and "grads" not in found
    if not isinstance(found, dict) or ("grads" not in found and not passes):
        raise InvalidRequest(
            'A JSON push is an object with "grads": {name: nested lists}.',
            errors=[{"field": "grads", "message": "Missing."}],
        )
    control = parse_control({k: v for k, v in found.items() if k != "grads"}, text=False)
    known = session.precheck(control)
    if control.is_pass != passes:
        raise pass_differs(control)
    if passes:
        return _pass(session, control)
    arena = session.ready
    master = session.spec.dtype
    limit = request.app.state.settings.json_elements
    read = partial(json.gradients, found["grads"], master, limit)
    came, some = await _aside(request, length, read)
    if not came and not some:
        raise TensorMismatch("The push holds no tensors; send every tensor of the session.")
    taken = [arena.gradients.acquire()]

    def release() -> None:
        while taken:
            arena.gradients.release(taken.pop())

    flat = taken[0][: arena.size * DTYPES[master]].view(NUMPY[master])
    try:
        rows = json.fill(arena.layout, came, flat, _taking(session, control, known=known), some)
    except BaseException:
        release()
        raise
    names = dict.fromkeys([*(name for name, _, _ in came), *(given.name for given in some)])
    present = presence(arena.layout, names)
    return Gradient(flat, master, control, release, present, rows=rows)


async def upload(
    request: Request,
    session: Session,
    member: str,
    known: tuple[str, ...],
    *,
    new: bool = False,
) -> Upload:
    """Reads parameters or state: from JSON under `member`, from safetensors as they are, or raw.

    Args:
        request: Its body is read.
        session: Whose layout a raw body has.
        member: Of a JSON body.
        known: Other members, or facts of the metadata.
        new: The tensors are new ones, which a raw body can't name.
    """
    media.check_encoding(request.headers.get("content-encoding"))
    form = media.parse_content_type(request.headers.get("content-type"))
    settings = request.app.state.settings
    if form.kind == "json":
        facts = await fields(request, (member, *known))
        given = facts.pop(member, None)
        limit = settings.json_elements
        return Upload(await inline_aside(request, given, session.spec.dtype, limit), facts, 0)
    if form.kind == "raw":
        return await _raw_upload(request, None if new else session.arena, form)
    return await _tensors(request, MAX_HEADER_BYTES)


async def checkpoint(request: Request) -> Upload:
    """Reads a checkpoint, whose header names parameters and state and may be longer."""
    return await _tensors(request, CHECKPOINT_HEADER)


async def _tensors(request: Request, header_bytes: int) -> Upload:
    """Reads safetensors as they are, into memory that is reserved first."""
    budget: Budget = request.app.state.budget
    length = _reserved(request, header_bytes)
    try:
        reader = safetensors.tensors_reader(length, lambda n: np.empty(n, np.uint8), header_bytes)
        await body.receive(stream(request), length, reader)
    except BaseException:
        budget.release(length)
        raise
    tensors: list[Tensor] = [
        (t.name, t.dtype, t.shape, _aligned(reader.data[t.begin : t.end], t.dtype))
        for t in reader.header.tensors
    ]
    return Upload(tensors, reader.metadata, length)


def _reserved(request: Request, header_bytes: int) -> int:
    """Bytes of the body, reserved: 507 before anything is allocated."""
    settings = request.app.state.settings
    limit = settings.memory_bytes + 8 + header_bytes
    length = body.content_length(request.headers.get("content-length"), limit)
    request.app.state.budget.reserve(length)
    return length


async def inline_aside(request: Request, found: Any, master: str, limit: int) -> list[Tensor]:
    """As `inline`; in the pool where the body is long."""
    length = int(request.headers["content-length"])
    return await _aside(request, length, partial(inline, found, master, limit))


def inline(found: Any, master: str, limit: int) -> list[Tensor]:
    """Tensors out of nested lists, in the master dtype."""
    return [
        (name, master, shape, np.asarray(flat, NUMPY[master]))
        for name, shape, flat in json.tensors(found, master, limit)
    ]


async def _raw_upload(request: Request, arena: Arena | None, form: media.Media) -> Upload:
    length = _reserved(request, 0)
    try:
        if arena is None:
            raise UnsupportedMediaType(
                f"This upload names its tensors; send it as {SAFETENSORS} or JSON.",
                accepted=[SAFETENSORS, JSON],
            )
        assert form.dtype is not None
        whole = np.empty(length, np.uint8)
        # A parameter upload may be wider than the master dtype: it is rounded, as safetensors is.
        reader = raw.raw_reader(arena.layout, form.dtype, "F64", length, lambda _: whole)
        await body.receive(stream(request), length, reader)
    except BaseException:
        request.app.state.budget.release(length)
        raise
    flat = whole.view(NUMPY[form.dtype])
    return Upload(
        [
            (e.name, form.dtype, e.shape, flat[e.offset : e.offset + e.size])
            for e in arena.layout.entries
        ],
        {},
        length,
    )


def _aligned(data: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The values of one tensor; copied only where mixed dtypes left them off their alignment."""
    if data.ctypes.data % DTYPES[dtype]:
        data = data.copy()
    return data.view(NUMPY[dtype])
