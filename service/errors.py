"""Every failure a user can cause, as one tree.

```
ServiceError
├── 400  BadRequest  InvalidJson
├── 401  KeyMissing
├── 403  KeyRequired  KeyWrong  OriginRefused
├── 404  SessionUnknown  NotFound  WorkerUnknown  CheckpointUnknown  RoundUnknown
├── 405  MethodNotAllowed
├── 406  NotAcceptable                       408  RequestTimeout (retry)
├── 409  SpecDiffers  Structural  InFlight (retry)  TooOld  WorkerRetired  EpochChanged
│        VersionUnknown  VersionPending (retry)  StaleGradient  ParamsMissing  AverageMissing
│        RoundClosed  RoundAbandoned  AlreadyContributed  OverridesDiffer
│        DeviceUnavailable  DataDirMissing  CheckpointExists  BackupRefused
├── 410  SessionGone                         411  LengthRequired
├── 412  PreconditionFailed                  413  BodyTooLarge
├── 415  UnsupportedMediaType  UnsupportedEncoding
├── 422  InvalidRequest  NotSupportedYet  InvalidTensors  TensorMismatch  Nonfinite  KeyReused
│        NormExceeded  SparseUnsupported
├── 429  TooManySessions (retry)  TooManyWorkers  Overloaded (retry)  LogFull (retry)
├── 500  Internal (retry)  BackupFailed
├── 503  ShuttingDown (retry)  Recovering (retry)  SessionDamaged
└── 507  InsufficientMemory  DiskFull
```

Errors are data plus one seam: a class has a stable `slug`, a status, a title and whether the same
bytes may be sent again; `problem()` is the RFC 9457 document; `install()` is the only handler.
A 4xx means that this attempt changed nothing.
"""

import json
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from gradpost.protocol import PROBLEM, PROBLEM_PREFIX

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class ServiceError(Exception):
    """A refusal, with a sentence that says what to do and the offending values.

    Args:
        detail: One or two sentences for the person who reads the answer.
        retry_after_s: Seconds after which the same request is worth sending again.
        context: Members added to the problem document (must be JSON-serialisable).
    """

    slug: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Unexpected failure"
    retryable: ClassVar[bool] = True

    def __init__(self, detail: str, *, retry_after_s: int | None = None, **context: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.context = context

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 document as a dict."""
        return {
            "type": PROBLEM_PREFIX + self.slug,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "retryable": self.retryable,
            **self.context,
        }

    def headers(self) -> dict[str, str]:
        """Headers the answer needs beside the document."""
        if self.retry_after_s is not None:
            return {"Retry-After": str(self.retry_after_s)}
        return {}


class BadRequest(ServiceError):
    """Malformed request."""

    slug = "bad-request"
    status = 400
    title = "Malformed request"
    retryable = False


class InvalidJson(ServiceError):
    """Not valid JSON."""

    slug = "invalid-json"
    status = 400
    title = "Not valid JSON"
    retryable = False


class KeyMissing(ServiceError):
    """API key missing."""

    slug = "key-missing"
    status = 401
    title = "API key missing"
    retryable = False


class KeyRequired(ServiceError):
    """The server has no API key and you are not on its machine."""

    slug = "key-required"
    status = 403
    title = "The server has no API key and you are not on its machine"
    retryable = False


class KeyWrong(ServiceError):
    """API key not accepted."""

    slug = "key-wrong"
    status = 403
    title = "API key not accepted"
    retryable = False


class OriginRefused(ServiceError):
    """Origin not allowed."""

    slug = "origin-refused"
    status = 403
    title = "Origin not allowed"
    retryable = False


class SessionUnknown(ServiceError):
    """No such session."""

    slug = "session-unknown"
    status = 404
    title = "No such session"
    retryable = False


class WorkerUnknown(ServiceError):
    """No such worker."""

    slug = "worker-unknown"
    status = 404
    title = "No such worker"
    retryable = False


class CheckpointUnknown(ServiceError):
    """No such checkpoint."""

    slug = "checkpoint-unknown"
    status = 404
    title = "No such checkpoint"
    retryable = False


class RoundUnknown(ServiceError):
    """No such round."""

    slug = "round-unknown"
    status = 404
    title = "No such round"
    retryable = False


class NotFound(ServiceError):
    """No such resource."""

    slug = "not-found"
    status = 404
    title = "No such resource"
    retryable = False


class MethodNotAllowed(ServiceError):
    """Method not allowed."""

    slug = "method-not-allowed"
    status = 405
    title = "Method not allowed"
    retryable = False


class NotAcceptable(ServiceError):
    """Not available in the asked-for form."""

    slug = "not-acceptable"
    status = 406
    title = "Not available in the asked-for form"
    retryable = False


class RequestTimeout(ServiceError):
    """The body arrived too slowly."""

    slug = "request-timeout"
    status = 408
    title = "The body arrived too slowly"
    retryable = True


class SpecDiffers(ServiceError):
    """The session exists with another specification."""

    slug = "spec-differs"
    status = 409
    title = "The session exists with another specification"
    retryable = False


class Structural(ServiceError):
    """Can not be changed after creation."""

    slug = "structural"
    status = 409
    title = "Can not be changed after creation"
    retryable = False


class InFlight(ServiceError):
    """The same push is being committed."""

    slug = "in-flight"
    status = 409
    title = "The same push is being committed"
    retryable = True


class TooOld(ServiceError):
    """Sequence below the worker's window."""

    slug = "too-old"
    status = 409
    title = "Sequence below the worker's window"
    retryable = False


class WorkerRetired(ServiceError):
    """Worker retired."""

    slug = "worker-retired"
    status = 409
    title = "Worker retired"
    retryable = False


class EpochChanged(ServiceError):
    """The session's history was cut."""

    slug = "epoch-changed"
    status = 409
    title = "The session's history was cut"
    retryable = False


class VersionUnknown(ServiceError):
    """No such version yet."""

    slug = "version-unknown"
    status = 409
    title = "No such version yet"
    retryable = False


class VersionPending(ServiceError):
    """Version not reached in time."""

    slug = "version-pending"
    status = 409
    title = "Version not reached in time"
    retryable = True


class StaleGradient(ServiceError):
    """Gradient too stale."""

    slug = "stale-gradient"
    status = 409
    title = "Gradient too stale"
    retryable = False


class RoundClosed(ServiceError):
    """The round of this gradient is closed."""

    slug = "round-closed"
    status = 409
    title = "The round of this gradient is closed"
    retryable = False


class RoundAbandoned(ServiceError):
    """The round was abandoned."""

    slug = "round-abandoned"
    status = 409
    title = "The round was abandoned"
    retryable = False


class AlreadyContributed(ServiceError):
    """The worker has contributed to this round."""

    slug = "already-contributed"
    status = 409
    title = "The worker has contributed to this round"
    retryable = False


class OverridesDiffer(ServiceError):
    """The overrides are not those of the round."""

    slug = "overrides-differ"
    status = 409
    title = "The overrides are not those of the round"
    retryable = False


class ParamsMissing(ServiceError):
    """The session has no parameters yet."""

    slug = "params-missing"
    status = 409
    title = "The session has no parameters yet"
    retryable = False


class AverageMissing(ServiceError):
    """The session keeps no average of its parameters."""

    slug = "average-missing"
    status = 409
    title = "The session keeps no average of its parameters"
    retryable = False


class DeviceUnavailable(ServiceError):
    """Device not available."""

    slug = "device-unavailable"
    status = 409
    title = "Device not available"
    retryable = False


class DataDirMissing(ServiceError):
    """The server has no data folder."""

    slug = "data-dir-missing"
    status = 409
    title = "The server has no data folder"
    retryable = False


class CheckpointExists(ServiceError):
    """Another checkpoint has this name."""

    slug = "checkpoint-exists"
    status = 409
    title = "Another checkpoint has this name"
    retryable = False


class BackupRefused(ServiceError):
    """No backup can be made now or there."""

    slug = "backup-refused"
    status = 409
    title = "No backup can be made now or there"
    retryable = False


class SessionGone(ServiceError):
    """The session was deleted."""

    slug = "session-gone"
    status = 410
    title = "The session was deleted"
    retryable = False


class LengthRequired(ServiceError):
    """Content-Length required."""

    slug = "length-required"
    status = 411
    title = "Content-Length required"
    retryable = False


class PreconditionFailed(ServiceError):
    """Precondition failed."""

    slug = "precondition-failed"
    status = 412
    title = "Precondition failed"
    retryable = False


class BodyTooLarge(ServiceError):
    """Body too large."""

    slug = "body-too-large"
    status = 413
    title = "Body too large"
    retryable = False


class UnsupportedMediaType(ServiceError):
    """Unsupported media type."""

    slug = "unsupported-media-type"
    status = 415
    title = "Unsupported media type"
    retryable = False


class UnsupportedEncoding(ServiceError):
    """Unsupported content encoding."""

    slug = "unsupported-encoding"
    status = 415
    title = "Unsupported content encoding"
    retryable = False


class InvalidRequest(ServiceError):
    """Invalid fields."""

    slug = "invalid-request"
    status = 422
    title = "Invalid fields"
    retryable = False


class NotSupportedYet(ServiceError):
    """Not supported yet."""

    slug = "not-supported-yet"
    status = 422
    title = "Not supported yet"
    retryable = False


class InvalidTensors(ServiceError):
    """Broken tensor container."""

    slug = "invalid-tensors"
    status = 422
    title = "Broken tensor container"
    retryable = False


class TensorMismatch(ServiceError):
    """Tensors do not fit the session."""

    slug = "tensor-mismatch"
    status = 422
    title = "Tensors do not fit the session"
    retryable = False


class Nonfinite(ServiceError):
    """Not finite."""

    slug = "nonfinite"
    status = 422
    title = "Not finite"
    retryable = False


class NormExceeded(ServiceError):
    """The gradient's norm is above the session's bound."""

    slug = "norm-exceeded"
    status = 422
    title = "The gradient's norm is above the session's bound"
    retryable = False


class KeyReused(ServiceError):
    """Worker and sequence were used for another push."""

    slug = "key-reused"
    status = 422
    title = "Worker and sequence were used for another push"
    retryable = False


class SparseUnsupported(ServiceError):
    """The rule or the update mode takes no rows alone."""

    slug = "sparse-unsupported"
    status = 422
    title = "The rule or the update mode takes no rows alone"
    retryable = False


class TooManySessions(ServiceError):
    """Too many sessions."""

    slug = "too-many-sessions"
    status = 429
    title = "Too many sessions"
    retryable = True


class TooManyWorkers(ServiceError):
    """Too many workers."""

    slug = "too-many-workers"
    status = 429
    title = "Too many workers"
    retryable = False


class Overloaded(ServiceError):
    """Overloaded."""

    slug = "overloaded"
    status = 429
    title = "Overloaded"
    retryable = True


class LogFull(ServiceError):
    """The session's log is full until its next snapshot."""

    slug = "log-full"
    status = 429
    title = "The log is full until the next snapshot"
    retryable = True


class Internal(ServiceError):
    """Unexpected failure."""

    slug = "internal"
    status = 500
    title = "Unexpected failure"
    retryable = True


class ShuttingDown(ServiceError):
    """Shutting down."""

    slug = "shutting-down"
    status = 503
    title = "Shutting down"
    retryable = True


class Recovering(ServiceError):
    """The session is being recovered from disk."""

    slug = "recovering"
    status = 503
    title = "The session is being recovered"
    retryable = True


class SessionDamaged(ServiceError):
    """What the disk holds of the session is damaged."""

    slug = "session-damaged"
    status = 503
    title = "The session is damaged on the disk"
    retryable = False


class BackupFailed(ServiceError):
    """The backup could not be written."""

    slug = "backup-failed"
    status = 500
    title = "The backup could not be written"
    retryable = False


class DiskFull(ServiceError):
    """The disk of the data folder is full."""

    slug = "disk-full"
    status = 507
    title = "The disk is full"
    retryable = False


class InsufficientMemory(ServiceError):
    """Not enough memory."""

    slug = "insufficient-memory"
    status = 507
    title = "Not enough memory"
    retryable = False


BY_SLUG: dict[str, type[ServiceError]] = {cls.slug: cls for cls in ServiceError.__subclasses__()}


def problem_response(error: ServiceError) -> Response:
    """Renders a refusal as application/problem+json."""
    return Response(
        json.dumps(error.problem(), allow_nan=False),
        status_code=error.status,
        media_type=PROBLEM,
        headers=error.headers(),
    )


def refused(scope: Scope, error: ServiceError) -> Response:
    """The answer to a refused request, of which the log and the metrics take note."""
    scope["gradpost.refusal"] = error.slug  # read by the front
    return problem_response(error)


def from_http(error: HTTPException, request: Request) -> ServiceError:
    """Translates what the router raises by itself into our tree."""
    if error.status_code == 405:
        methods = ", ".join(allowed(request))
        return MethodNotAllowed(f"{request.method} is not defined here; allowed: {methods}.")
    if error.status_code == 404:
        path = request.url.path[:200]
        return NotFound(f"Nothing is served at {path}; /openapi.json lists the calls.")
    return BadRequest(str(error.detail))


def allowed(request: Request) -> list[str]:
    """The methods of a path: the router's own Allow has only those of the first route of it."""
    routes = request.app.routes
    scopes = ({**request.scope, "method": method} for method in METHODS)
    return [
        scope["method"]
        for scope in scopes
        if any(route.matches(scope)[0] is Match.FULL for route in routes)
    ]


def install(app: FastAPI) -> None:
    """Registers the handlers that turn every exception of the tree into a problem document."""

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        return refused(request.scope, error)

    async def route_missing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        mine = from_http(error, request)
        request.scope["gradpost.refusal"] = mine.slug
        response = problem_response(mine)
        if mine.status == 405:
            response.headers["Allow"] = ", ".join(allowed(request))
        return response

    app.add_exception_handler(ServiceError, refuse)
    app.add_exception_handler(HTTPException, route_missing)
