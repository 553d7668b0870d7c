"""What can go wrong, as one tree.

```
GradpostError            retryable: whether the same call is worth making again
├── ClosedError          the session was closed
├── NotPulled            a gradient was pushed before any parameters were pulled
├── CertificateError     the server's TLS certificate is not trusted
├── TransportError       no (whole) answer came
├── DeadlineExceeded     retries used up the time; `last` is the last failure
└── RefusedError         the server answered with a problem; one subclass per problem type
```
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from gradpost.protocol import PROBLEM_PREFIX, PROBLEMS


class GradpostError(Exception):
    """Every failure of this package."""

    retryable: bool = False


class ClosedError(GradpostError):
    """The session object was closed; attach again."""


class NotPulled(GradpostError):
    """A push has to say which parameters its gradient was computed from, and none were pulled."""


class CertificateError(GradpostError):
    """The server's TLS certificate is not trusted; no retry mends that."""


class TransportError(GradpostError):
    """The server could not be reached, or its answer broke off."""

    retryable = True


class DeadlineExceeded(GradpostError):
    """The retries used up their time; what the last one did is not known.

    Args:
        message: What was tried.
        last: The last failure.
    """

    retryable = True

    def __init__(self, message: str, last: GradpostError | None = None) -> None:
        super().__init__(message, last)
        self.last = last

    def __str__(self) -> str:
        return str(self.args[0])


class RefusedError(GradpostError):
    """The server refused: this attempt changed nothing (a 5xx apart).

    Args:
        status: HTTP status.
        problem: The problem document, RFC 9457.
        retry_after_s: What Retry-After asked for, in seconds.
    """

    slug: ClassVar[str] = ""

    def __init__(
        self, status: int, problem: Mapping[str, Any], retry_after_s: float | None = None
    ) -> None:
        super().__init__(status, dict(problem), retry_after_s)  # the args are what pickle keeps
        self.status = status
        self.problem = dict(problem)
        self.retry_after_s = retry_after_s
        said = problem.get("retryable")
        by_status = status in (408, 429) or (status >= 500 and status != 507)
        self.retryable = said if isinstance(said, bool) else PROBLEMS.get(self.slug, by_status)

    @property
    def detail(self) -> str:
        """The sentence that says what to do."""
        return str(self.problem.get("detail") or self.problem.get("title") or "no detail given")

    @property
    def step(self) -> int | None:
        """The session's step, where the problem states it."""
        return self._number("step")

    @property
    def epoch(self) -> int | None:
        """The session's epoch, where the problem states it."""
        return self._number("epoch")

    @property
    def version(self) -> int | None:
        """The session's version, where the problem states it."""
        return self._number("version")

    def _number(self, name: str) -> int | None:
        value = self.problem.get(name)
        return value if isinstance(value, int) else None

    def __str__(self) -> str:
        return f"{self.status} {self.slug or 'refused'}: {self.detail}"


class BadRequest(RefusedError):
    """Malformed request."""

    slug = "bad-request"


class InvalidJson(RefusedError):
    """Not valid JSON."""

    slug = "invalid-json"


class KeyMissing(RefusedError):
    """API key missing."""

    slug = "key-missing"


class KeyRequired(RefusedError):
    """The server has no API key and you are not on its machine."""

    slug = "key-required"


class KeyWrong(RefusedError):
    """API key not accepted."""

    slug = "key-wrong"


class OriginRefused(RefusedError):
    """Origin not allowed."""

    slug = "origin-refused"


class SessionUnknown(RefusedError):
    """No such session."""

    slug = "session-unknown"


class NotFound(RefusedError):
    """No such resource."""

    slug = "not-found"


class MethodNotAllowed(RefusedError):
    """Method not allowed."""

    slug = "method-not-allowed"


class NotAcceptable(RefusedError):
    """Not available in the asked-for form."""

    slug = "not-acceptable"


class RequestTimeout(RefusedError):
    """The body arrived too slowly."""

    slug = "request-timeout"


class SpecDiffers(RefusedError):
    """The session exists with another specification."""

    slug = "spec-differs"


class Structural(RefusedError):
    """Can not be changed after creation."""

    slug = "structural"


class InFlight(RefusedError):
    """The same push is being committed."""

    slug = "in-flight"


class TooOld(RefusedError):
    """Sequence below the worker's window."""

    slug = "too-old"


class WorkerRetired(RefusedError):
    """Worker retired."""

    slug = "worker-retired"


class EpochChanged(RefusedError):
    """The session's history was cut."""

    slug = "epoch-changed"


class VersionUnknown(RefusedError):
    """No such version yet."""

    slug = "version-unknown"


class VersionPending(RefusedError):
    """Version not reached in time."""

    slug = "version-pending"


class StaleGradient(RefusedError):
    """Gradient too stale."""

    slug = "stale-gradient"


class ParamsMissing(RefusedError):
    """The session has no parameters yet."""

    slug = "params-missing"


class DeviceUnavailable(RefusedError):
    """Device not available."""

    slug = "device-unavailable"


class SessionGone(RefusedError):
    """The session was deleted."""

    slug = "session-gone"


class LengthRequired(RefusedError):
    """Content-Length required."""

    slug = "length-required"


class PreconditionFailed(RefusedError):
    """Precondition failed."""

    slug = "precondition-failed"


class BodyTooLarge(RefusedError):
    """Body too large."""

    slug = "body-too-large"


class UnsupportedMediaType(RefusedError):
    """Unsupported media type."""

    slug = "unsupported-media-type"


class UnsupportedEncoding(RefusedError):
    """Unsupported content encoding."""

    slug = "unsupported-encoding"


class InvalidRequest(RefusedError):
    """Invalid fields."""

    slug = "invalid-request"


class NotSupportedYet(RefusedError):
    """Not supported yet."""

    slug = "not-supported-yet"


class InvalidTensors(RefusedError):
    """Broken tensor container."""

    slug = "invalid-tensors"


class TensorMismatch(RefusedError):
    """Tensors do not fit the session."""

    slug = "tensor-mismatch"


class Nonfinite(RefusedError):
    """Not finite."""

    slug = "nonfinite"


class KeyReused(RefusedError):
    """Worker and sequence were used for another push."""

    slug = "key-reused"


class TooManySessions(RefusedError):
    """Too many sessions."""

    slug = "too-many-sessions"


class TooManyWorkers(RefusedError):
    """Too many workers."""

    slug = "too-many-workers"


class Overloaded(RefusedError):
    """Overloaded."""

    slug = "overloaded"


class Internal(RefusedError):
    """Unexpected failure."""

    slug = "internal"


class ShuttingDown(RefusedError):
    """Shutting down."""

    slug = "shutting-down"


class InsufficientMemory(RefusedError):
    """Not enough memory."""

    slug = "insufficient-memory"


BY_SLUG: Mapping[str, type[RefusedError]] = {one.slug: one for one in RefusedError.__subclasses__()}


def refusal(
    status: int, problem: Mapping[str, Any], retry_after_s: float | None = None
) -> RefusedError:
    """The error of a problem document, in its own class where its type is known."""
    slug = str(problem.get("type", "")).rpartition(PROBLEM_PREFIX)[2]
    return BY_SLUG.get(slug, RefusedError)(status, problem, retry_after_s)
