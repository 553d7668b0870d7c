"""From versions to answers: JSON for people, views of the arena for machines."""

import hashlib
import json as plain_json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from fastapi import Request, Response

from gradpost.protocol import (
    EPOCH,
    INCARNATION,
    JSON,
    SAFETENSORS,
    SINCE,
    STEP,
    SUMMARY,
    VERSION,
)
from gradpost.protocol.dtypes import DTYPES, NUMPY
from gradpost.protocol.tensors import build_header
from gradpost.protocol.versions import etag, format_version
from service.answers import TensorAnswer
from service.errors import InvalidRequest, NotAcceptable, Overloaded, VersionUnknown
from service.limits import Budget
from service.sessions.contributions import told
from service.sessions.conversion import Packed, converted
from service.sessions.lane import in_pool
from service.sessions.ledger import Contributed, Summary
from service.sessions.session import Session, Shared
from service.sessions.versions import Version
from service.wire import json, raw, safetensors
from service.wire.fit import select
from service.wire.media import Media
from service.wire.reader import EntryLike

FEW = 1024
"""Numbers that are rendered on the event loop: about a millisecond of it."""
DTYPE_CHOICES = (*DTYPES, "model")


class Wanted(NamedTuple):
    """Which parameters an answer carries, and how."""

    media: Media
    names: tuple[str, ...] | None
    dtype: str | None
    average: bool = False
    since: tuple[int, int] | None = None
    """The version that the asker has; None: everything is sent."""
    changed: frozenset[int] = frozenset()
    """Layout entries that differ from that version."""

    @property
    def representation(self) -> str:
        """The last part of the ETag: differs whenever the bytes would."""
        mark = f"{self.media.kind}.{self.dtype or self.media.dtype or 'master'}"
        if self.average:
            mark += ".ema"
        if self.since is not None:
            mark += f".since-{format_version(*self.since)}"
        if self.names is None:
            return mark
        names = "\0".join(sorted(set(self.names)))
        return f"{mark}.{hashlib.sha256(names.encode()).hexdigest()[:16]}"


def wanted(media: Media, names: tuple[str, ...] | None, dtype: str | None) -> Wanted:
    """Checks what was asked for against itself.

    Raises:
        InvalidRequest: An unknown dtype.
        NotAcceptable: JSON in another dtype than the session's, or a raw body of `model`.
    """
    if dtype is not None and dtype not in DTYPE_CHOICES:
        raise InvalidRequest(
            f"dtype {dtype[:40]!r} is not known; ask for one of {', '.join(DTYPE_CHOICES)}.",
            errors=[{"field": "dtype", "message": f"One of {', '.join(DTYPE_CHOICES)}."}],
        )
    if media.kind == "raw" and "model" in (dtype, media.dtype):
        raise NotAcceptable(
            f"A raw body has one dtype; ask for dtype=model as {SAFETENSORS}.",
            available=[SAFETENSORS],
        )
    return Wanted(media, names, dtype)


def lacking(
    session: Session, want: Wanted, since: tuple[int, int] | None, at: tuple[int, int]
) -> Wanted:
    """What an asker who has the version `since` lacks of the version `at`; all if in doubt.

    Raises:
        VersionUnknown: There is no such version yet.
    """
    if since is None:
        return want
    if since > at:
        raise VersionUnknown(
            f"since={format_version(*since)} does not exist; the newest version is "
            f"{format_version(*at)}. Was the server restarted? Pull without it.",
            epoch=at[0],
            version=at[1],
        )
    changed = session.changes.since(since, at)
    return want if changed is None else want._replace(since=since, changed=changed)


def summary_text(summary: Summary, *, replayed: bool, ahead: bool | None = None) -> str:
    """What a push did, as JSON."""
    return plain_json.dumps(summary.answer(replayed=replayed, ahead=ahead))


def summary_answer(
    session: Session, summary: Summary, *, replayed: bool, ahead: bool | None = None
) -> Response:
    """The JSON answer to a push without parameters."""
    return Response(
        summary_text(summary, replayed=replayed, ahead=ahead),
        headers={
            **_numbers(summary.epoch, summary.version, summary.step),
            "Content-Type": JSON,
        },
    )


def open_answer(session: Session, fate: Contributed, *, replayed: bool) -> Response:
    """The answer to a contribution whose round is open: its end is at Location."""
    return Response(
        plain_json.dumps(told(session, fate, replayed=replayed)),
        status_code=202,
        headers={
            **_numbers(session.epoch, session.version, session.step),
            "Content-Type": JSON,
            "Location": f"/v1/sessions/{session.id}/rounds/{fate.round}",
        },
    )


async def average_answer(session: Session, want: Wanted, budget: Budget) -> Response:
    """The average of the parameters: a copy, paid for while it is sent."""
    nbytes = session.ready.size * DTYPES[session.spec.dtype]
    if not budget.try_reserve(nbytes):
        raise Overloaded(
            f"No memory for a copy of {nbytes} bytes now; ask again after the pause.",
            retry_after_s=1,
            bytes=nbytes,
        )
    done = partial(budget.release, nbytes)
    try:
        version = await session.copy_average()
    except BaseException:
        done()
        raise
    return await params_answer(session, version, want, None, done)


async def params_answer(
    session: Session,
    version: Version,
    want: Wanted,
    summary: str | None,
    done: Callable[[], None] | None = None,
) -> Response:
    """The parameters of a held version; gives the version back when its bytes have left.

    Args:
        session: Whose they are.
        version: Held for this answer.
        want: The form.
        summary: What the push did, as JSON, where this answers one.
        done: Gives the version back; None: to the session.
    """
    done = done or partial(session.release, version)
    try:
        answer = await _rendered(session, version, want, summary, done)
    except BaseException:
        done()
        raise
    if not isinstance(answer, TensorAnswer):
        done()
    return answer


async def _rendered(
    session: Session,
    version: Version,
    want: Wanted,
    summary: str | None,
    done: Callable[[], None],
) -> Response:
    layout = version.owner.layout  # the session's own may have grown since
    entries, names = select(layout, want.names), want.names
    if want.since is not None:
        wanted = frozenset(entry.name for entry in entries)
        pairs = enumerate(layout.entries)
        entries = [e for at, e in pairs if at in want.changed and e.name in wanted]
        names = tuple(entry.name for entry in entries)
    headers = {
        **_numbers(version.epoch, version.number, version.step),
        "ETag": etag(version.epoch, version.number, want.representation),
        INCARNATION: session.incarnation,
    }
    if want.since is not None:
        headers[SINCE] = format_version(*want.since)
    if summary is None:
        headers |= {
            "Vary": "Accept, Prefer",
            "Cache-Control": "no-cache",
        }
    else:  # nobody caches the answer to a POST
        headers[SUMMARY] = summary
    master = session.spec.dtype
    asked = want.dtype or want.media.dtype or master
    if want.media.kind == "json":
        return await _as_json(session, version, entries, asked, headers, summary)
    if want.media.kind == "raw":
        headers["Content-Type"] = Media("raw", asked).content_type
    else:
        headers["Content-Type"] = SAFETENSORS
    facts = _facts(version, summary)
    if asked == master:
        if want.media.kind == "raw":
            return TensorAnswer(raw.parts(layout, version.flat, names), 200, headers, done)
        body = safetensors.parts(layout, version.flat, master, names, facts)
        return TensorAnswer(body, 200, headers, done)
    dtypes = [entry.dtype if asked == "model" else asked for entry in entries]
    rows = ((e.name, d, e.shape) for e, d in zip(entries, dtypes, strict=True))
    head = [build_header(rows, facts)] if want.media.kind == "safetensors" else []
    packed = await converted(session, version, entries, dtypes)
    done()  # the copy is what is sent
    return TensorAnswer([*head, packed.data.data], 200, headers, packed.release)


async def _as_json(
    session: Session,
    version: Version,
    entries: Sequence[EntryLike],
    asked: str,
    headers: dict[str, str],
    summary: str | None,
) -> Response:
    if asked == session.spec.dtype:
        rendered = await render(
            session.shared,
            [(e.name, e.shape, version.flat[e.offset : e.offset + e.size]) for e in entries],
        )
    else:
        dtypes = [entry.dtype if asked == "model" else asked for entry in entries]
        packed = await converted(session, version, entries, dtypes)
        try:
            rendered = await render(session.shared, _unpacked(packed, entries, dtypes))
        finally:
            packed.release()
    numbers = {"epoch": version.epoch, "version": version.number, "step": version.step}
    head = (plain_json.dumps(numbers) if summary is None else summary)[:-1]
    return Response(
        head.encode() + b', "params": ' + rendered + b"}",
        headers={**headers, "Content-Type": JSON},
    )


async def render(shared: Shared, tensors: Sequence[tuple[str, tuple[int, ...], Any]]) -> bytes:
    """Tensors as JSON; more than a few are rendered in the pool."""
    work = partial(
        json.render_tensors,
        tensors,
        max_elements=shared.settings.json_elements,
        max_bytes=shared.settings.json_bytes,
    )
    few = len(tensors) + sum(flat.size for _, _, flat in tensors) <= FEW
    return work() if few else await in_pool(shared.pool, work)


def _unpacked(
    packed: Packed, entries: Sequence[EntryLike], dtypes: Sequence[str]
) -> list[tuple[str, tuple[int, ...], Any]]:
    """The tensors of a packed copy, aligned."""
    pieces, at = [], 0
    for entry, dtype in zip(entries, dtypes, strict=True):
        end = at + entry.size * DTYPES[dtype]
        pieces.append((entry.name, entry.shape, packed.data[at:end].copy().view(NUMPY[dtype])))
        at = end
    return pieces


def _facts(version: Version, summary: str | None) -> dict[str, str]:
    facts = {
        "epoch": str(version.epoch),
        "version": str(version.number),
        "step": str(version.step),
    }
    if summary is not None:
        facts["summary"] = summary
    return facts


def _numbers(epoch: int, version: int, step: int) -> dict[str, str]:
    return {EPOCH: str(epoch), VERSION: str(version), STEP: str(step)}


def not_modified(request: Request, tag: str) -> bool:
    """Whether If-None-Match names this tag (or `*`)."""
    value = request.headers.get("if-none-match")
    if value is None:
        return False
    tags = [item.strip().removeprefix("W/") for item in value.split(",")]
    return tag in tags or "*" in tags
