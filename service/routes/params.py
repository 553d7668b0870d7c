"""Parameters: upload, and pull."""

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from gradpost.protocol import JSON, SAFETENSORS
from gradpost.protocol.versions import etag, parse_tag
from service.errors import EpochChanged, NotAcceptable, PreconditionFailed
from service.routes import reading
from service.routes.answering import (
    Wanted,
    average_answer,
    lacking,
    not_modified,
    params_answer,
    wanted,
)
from service.routes.documents import (
    BODY,
    DTYPE,
    NAMES,
    PREFER,
    SESSION,
    TENSOR_MEDIA,
    VERSION,
    WORKER,
    body,
    header,
    query,
    refusals,
)
from service.routes.sessions import describe
from service.schemas import (
    ParamsAnswer,
    SessionInfo,
    check_worker,
    one_of_each,
    parse_base,
    parse_prefer,
)
from service.schemas.refusals import invalid
from service.sessions.session import Base, Session
from service.wire.media import choose_accept

router = APIRouter(prefix="/v1/sessions", tags=["params"])

IF_MATCH = header(
    "If-Match",
    '`"1-7"`, or the ETag of a pull: only onto this version; `"epoch-1"`: only if there was no '
    "upload since this epoch began; `*`: only if there are parameters.",
    {"type": "string"},
)


def expected(request: Request, session: Session) -> Base | None:
    """The (epoch, version) an upload is made for, by If-Match: None is any; no other tag matches.

    Raises:
        PreconditionFailed: The session is elsewhere already, so its body need not be read.
    """
    tag = request.headers.get("if-match")
    if tag is None or (tag.strip() == "*" and session.arena is not None):
        return None
    try:
        base = parse_tag(tag.strip())
    except ValueError as error:
        raise PreconditionFailed(
            f'{error} If-Match takes one, as "{session.epoch}-{session.version}", or * once there '
            "are parameters.",
            epoch=session.epoch,
            version=session.version,
        ) from None
    session.check_version(base)
    return base


@router.get(
    "/{id}/params",
    summary="Pull parameters",
    responses={
        200: {
            "model": ParamsAnswer,
            "description": "One version, whole.",
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/ParamsAnswer"}},
                **TENSOR_MEDIA,
            },
        },
        304: {"description": "If-None-Match names the current version in this form."},
        **refusals(
            *SESSION,
            *("not-acceptable", "params-missing", "tensor-mismatch", "invalid-request"),
            *("version-pending", "version-unknown", "epoch-changed", "average-missing"),
            "overloaded",
        ),
    },
    openapi_extra={
        "parameters": [
            NAMES,
            DTYPE,
            query(
                "of",
                "`ema`: the average of the parameters, where the session keeps one.",
                {"type": "string", "enum": ["params", "ema"]},
            ),
            query("worker", "Who pulls; its lease is renewed.", WORKER),
            query("min_version", "The least version to answer with.", VERSION),
            query(
                "since",
                "The version that the asker has: the answer may hold only the tensors that have "
                "changed since, and then says so by the header `Gradpost-Since`.",
                VERSION,
            ),
            PREFER,
            header("If-None-Match", "The ETag of a pull before.", {"type": "string"}),
        ]
    },
)
async def pull(id: str, request: Request) -> Response:
    """Streams one immutable version; steps go on meanwhile."""
    state = request.app.state
    session: Session = state.sessions.get(id)
    pairs = request.query_params.multi_items()
    asked = one_of_each(pairs, many=("names",))
    names = tuple(value for name, value in pairs if name == "names") or None
    unknown = sorted(asked.keys() - {"dtype", "min_version", "of", "since", "worker"})
    if unknown:
        raise invalid(
            unknown[0][:80],
            "Not known here; a pull takes names, dtype, min_version, since, of and worker.",
        )
    if "worker" in asked:
        session.members.renew(check_worker(asked["worker"]))
    if asked.get("of", "params") not in ("params", "ema"):
        raise invalid("of", "params (or leave it out), or ema, the average of the parameters.")
    want = wanted(choose_accept(request.headers.get("accept")), names, asked.get("dtype"))
    want = want._replace(average=asked.get("of") == "ema")
    since = _since(asked, want)
    at_least = None
    if "min_version" in asked:
        at_least = parse_base("min_version", asked["min_version"])
        if at_least[0] < session.epoch:
            raise EpochChanged(
                f"min_version is of epoch {at_least[0]} and the session is in epoch "
                f"{session.epoch}; pull without it.",
                epoch=session.epoch,
                version=session.version,
            )
    session.ready  # noqa: B018 - refuses a session without parameters
    wait = parse_prefer(request.headers.get("prefer"), state.settings.wait_cap_s).wait_s
    here = session.epoch, session.version
    if at_least is None or here >= at_least:
        current = etag(*here, lacking(session, want, since, here).representation)
        if not_modified(request, current):
            return Response(status_code=304, headers={"ETag": current, "Vary": "Accept, Prefer"})
    version = await session.hold(at_least, wait or 0.0)
    if want.average:
        session.release(version)  # what was waited for is there; the average is copied now
        return await average_answer(session, want, state.budget)
    try:
        want = lacking(session, want, since, (version.epoch, version.number))
    except BaseException:
        session.release(version)
        raise
    return await params_answer(session, version, want, None)


def _since(asked: dict[str, str], want: Wanted) -> tuple[int, int] | None:
    """The version that the asker has.

    Raises:
        InvalidRequest: It is none, or the average is asked for, all of which changes each time.
        NotAcceptable: A raw body, which could not say which tensors it holds.
    """
    if "since" not in asked:
        return None
    if want.average:
        raise invalid("since", "Not with of=ema, all of which changes with each update.")
    if want.media.kind == "raw":
        raise NotAcceptable(
            f"A raw body is always whole; ask for since as {SAFETENSORS} or {JSON}.",
            available=[SAFETENSORS, JSON],
        )
    return parse_base("since", asked["since"])


@router.put(
    "/{id}/params",
    summary="Upload parameters",
    responses={
        200: {"model": SessionInfo, "description": "Taken; a later upload starts a new epoch."},
        **refusals(
            *BODY,
            *SESSION,
            *("invalid-json", "precondition-failed", "invalid-tensors", "tensor-mismatch"),
            *("nonfinite", "insufficient-memory", "disk-full"),
        ),
    },
    openapi_extra={
        **body(
            {
                "type": "object",
                "required": ["params"],
                "properties": {"params": {"type": "object"}},
            },
            tensors=True,
        ),
        "parameters": [
            header("If-None-Match", "`*`: only if there are none yet.", {"enum": ["*"]}),
            IF_MATCH,
        ],
    },
)
async def upload(id: str, request: Request) -> Response:
    """The first upload is the whole model and fixes the layout; later ones may be partial."""
    state = request.app.state
    session: Session = state.sessions.get(id)
    condition = request.headers.get("if-none-match")
    if condition is not None and condition.strip() != "*":
        raise invalid("If-None-Match", "An upload takes only *, for the first of several workers.")
    first_only = condition is not None
    session.check_alive()
    if first_only:
        session.check_first()
    base = expected(request, session)
    with state.uploads:
        taken = await reading.upload(request, session, "params", ())
        try:
            await session.load(taken.tensors, first_only=first_only, base=base)
        finally:
            if taken.reserved:
                state.budget.release(taken.reserved)
    return JSONResponse(
        describe(session),
        headers={"ETag": f'"spec-{session.revision}"', "Location": f"/v1/sessions/{id}/params"},
    )
