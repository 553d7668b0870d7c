"""Parameters: upload, and pull."""

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from gradpost.protocol import JSON
from gradpost.protocol.versions import etag
from service.errors import EpochChanged
from service.routes import reading
from service.routes.answering import not_modified, params_answer, wanted
from service.routes.documents import (
    BODY,
    DTYPE,
    NAMES,
    PREFER,
    SESSION,
    TENSOR_MEDIA,
    VERSION,
    body,
    header,
    query,
    refusals,
)
from service.routes.sessions import describe
from service.schemas import ParamsAnswer, SessionInfo, one_of_each, parse_base, parse_prefer
from service.schemas.spec import invalid
from service.sessions.session import Session
from service.wire.media import choose_accept

router = APIRouter(prefix="/v1/sessions", tags=["params"])


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
            *("version-pending", "epoch-changed"),
        ),
    },
    openapi_extra={
        "parameters": [
            NAMES,
            DTYPE,
            query("min_version", "The least version to answer with.", VERSION),
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
    unknown = sorted(asked.keys() - {"dtype", "min_version"})
    if unknown:
        raise invalid(unknown[0][:80], "Not known here; a pull takes names, dtype, min_version.")
    want = wanted(choose_accept(request.headers.get("accept")), names, asked.get("dtype"))
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
    current = etag(session.epoch, session.version, want.representation)
    reached = at_least is None or (session.epoch, session.version) >= at_least
    if reached and not_modified(request, current):
        return Response(status_code=304, headers={"ETag": current, "Vary": "Accept, Prefer"})
    return await params_answer(session, await session.hold(at_least, wait), want, None)


@router.put(
    "/{id}/params",
    summary="Upload parameters",
    responses={
        200: {"model": SessionInfo, "description": "Taken; a later upload starts a new epoch."},
        **refusals(
            *BODY,
            *SESSION,
            *("invalid-json", "precondition-failed", "invalid-tensors", "tensor-mismatch"),
            *("nonfinite", "insufficient-memory"),
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
            header("If-None-Match", "`*`: only if there are none yet.", {"enum": ["*"]})
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
    with state.uploads:
        taken = await reading.upload(request, session, "params", ())
        try:
            await session.load(taken.tensors, first_only=first_only)
        finally:
            if taken.reserved:
                state.budget.release(taken.reserved)
    return JSONResponse(
        describe(session),
        headers={"ETag": f'"spec-{session.revision}"', "Location": f"/v1/sessions/{id}/params"},
    )
