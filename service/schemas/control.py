"""Control values of a push and of a pull. By hand: a query model doubles the cost of a step."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gradpost.protocol.versions import parse_version
from service.errors import BadRequest, NotSupportedYet
from service.hyper import nearest
from service.schemas.refusals import invalid

_WORKER = re.compile(r"[A-Za-z0-9._-]{1,128}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FIELDS = [
    *("worker", "sequence", "base_version", "loss", "grad_scale", "overrides", "incarnation"),
    "weight",
]
_SOON = {
    "found_inf": "do not push such a gradient, or create the session with on_nonfinite: skip",
}
MOST_GROUPS = 1001
MOST_FIELDS = 64
_SCALES = (1e-30, 1e30)


class PushControl(NamedTuple):
    """What a push says of itself; all None when it is not identified."""

    worker: str | None
    sequence: int | None
    base_version: tuple[int, int] | None
    loss: float | None
    grad_scale: float | None = None
    overrides: str | None = None
    """Canonical JSON text: {group name: {hyperparameter: value}}."""
    incarnation: str | None = None
    weight: float | None = None
    """Of a contribution to a round; 0 is a pass, which has no gradient."""

    @property
    def is_pass(self) -> bool:
        """Whether there is no gradient with it."""
        return self.weight == 0

    @property
    def key(self) -> tuple[str, int] | None:
        """What identifies the push, if anything does."""
        if self.worker is None or self.sequence is None:
            return None
        return self.worker, self.sequence

    @property
    def canonical(self) -> bytes:
        """The control values as bytes, the same for every encoding of the same push."""
        more = (self.grad_scale, self.overrides)
        text = f"{self.base_version} {self.loss!r}"
        if more != (None, None):
            text = f"{text} {more!r}"
        if self.weight not in (None, 1.0):
            text = f"{text} weight {self.weight!r}"
        return text.encode()


class Prefer(NamedTuple):
    """What a Prefer header (RFC 7240) asks for."""

    wait_s: float | None
    """None: it says nothing of waiting."""
    representation: bool


def parse_control(values: Mapping[str, Any], *, text: bool) -> PushControl:
    """Validates the control values of a push.

    Args:
        values: From the query (`text`: all are strings) or from a JSON body.
        text: Whether numbers come as text.

    Raises:
        InvalidRequest: Unknown fields, bad values, or a worker without a sequence.
        NotSupportedYet: Fields of later versions.
    """
    for name in values:
        if name in _FIELDS:
            continue
        if name in _SOON:
            raise NotSupportedYet(f"{name} is not supported yet ({_SOON[name]}).", field=name)
        known = _FIELDS if text else [*_FIELDS, "grads"]
        raise invalid(name[:80], f"A push has no such field; {nearest(name[:80], known)}")
    worker, sequence = values.get("worker"), values.get("sequence")
    if (worker is None) != (sequence is None):
        missing = "sequence" if sequence is None else "worker"
        raise invalid(
            missing, "A push is identified by worker and sequence: send both, or neither."
        )
    base = values.get("base_version")
    if worker is not None and base is None:
        raise invalid(
            "base_version", "An identified push states the version its gradient was computed from."
        )
    return PushControl(
        None if worker is None else _worker(worker),
        None if sequence is None else _whole("sequence", sequence, text=text),
        None if base is None else parse_base("base_version", base),
        None if values.get("loss") is None else _loss(values["loss"], text=text),
        None if values.get("grad_scale") is None else _scale(values["grad_scale"], text=text),
        None if values.get("overrides") is None else _overrides(values["overrides"]),
        None if values.get("incarnation") is None else _incarnation(values["incarnation"]),
        None if values.get("weight") is None else _weight(values["weight"], text=text),
    )


def _worker(value: Any) -> str:
    if not isinstance(value, str) or not _WORKER.fullmatch(value):
        raise invalid("worker", "A worker id is 1 to 128 letters, digits, dots, dashes or _.")
    return value


def _incarnation(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{32}", value):
        raise invalid("incarnation", "32 hexadecimal digits, as the session's description has it.")
    return value


def _whole(field: str, value: Any, *, text: bool) -> int:
    if text and isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise invalid(field, "A whole number from 0 to 2**63 - 1, without sign or fraction.")
    return value


def parse_count(field: str, value: str, least: int, most: int) -> int:
    """A whole number of a query, within its bounds."""
    number = int(value) if re.fullmatch(r"[0-9]{1,19}", value) else -1
    if not least <= number <= most:
        raise invalid(field, f"A whole number from {least} to {most}.")
    return number


def parse_base(field: str, value: Any) -> tuple[int, int]:
    """A version out of a query or a JSON body."""
    try:
        return parse_version(value)
    except ValueError as error:
        raise invalid(field, str(error)) from None


def _number(value: Any, *, text: bool) -> float:
    """A float; NaN for what is none."""
    if isinstance(value, bool) or (isinstance(value, str) and not text):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _loss(value: Any, *, text: bool) -> float:
    number = _number(value, text=text)
    if not math.isfinite(number):
        raise invalid("loss", "A finite number, for the history; leave it out if there is none.")
    return number


def _scale(value: Any, *, text: bool) -> float:
    number = _number(value, text=text)
    if not _SCALES[0] <= number <= _SCALES[1]:
        raise invalid(
            "grad_scale", f"A number from {_SCALES[0]:g} to {_SCALES[1]:g}: the gradient is "
            "divided by it."
        )  # fmt: skip
    return number


def _weight(value: Any, *, text: bool) -> float:
    number = _number(value, text=text)
    if not (number == 0 or _SCALES[0] <= number <= _SCALES[1]):
        raise invalid(
            "weight", f"A number from {_SCALES[0]:g} to {_SCALES[1]:g}, or 0 for a pass, which has "
            "no gradient with it."
        )  # fmt: skip
    return abs(number)  # -0 is 0


def _overrides(value: Any) -> str | None:
    """The canonical text; no group changed is no override."""
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise invalid(
            "overrides", 'An object: group name → hyperparameters, as {"default": {"lr": 0.1}}.'
        )
    if len(value) > MOST_GROUPS or any(len(fields) > MOST_FIELDS for fields in value.values()):
        raise invalid("overrides", "More groups or fields than any session has.")
    kept = {name: fields for name, fields in value.items() if fields}
    return json.dumps(kept, sort_keys=True) if kept else None


def parse_prefer(value: str | None, wait_cap_s: float) -> Prefer:
    """Reads a Prefer header; what is not understood is ignored, as RFC 7240 has it."""
    if not value:
        return Prefer(None, False)
    asked: dict[str, str] = {}
    for item in value.split(","):
        name, _, given = item.partition(";")[0].strip().partition("=")
        # Of a preference that is stated twice the first counts.
        asked.setdefault(name.strip().lower(), given.strip().strip('"'))
    wait = asked.get("wait", "")
    patient = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", wait)
    wait_s = min(float(wait), wait_cap_s) if patient else None
    representation = asked.get("return", "").lower() == "representation"
    return Prefer(wait_s, representation)


def check_worker(value: str) -> str:
    """A worker id.

    Raises:
        InvalidRequest: Not 1 to 128 letters, digits, dots, dashes and underscores.
    """
    if not _WORKER.fullmatch(value):
        raise invalid("worker", "A worker id is 1 to 128 letters, digits, dots, dashes or _.")
    return value


def check_checkpoint(value: object, field: str = "checkpoint") -> str:
    """The name of a checkpoint, or of a backup.

    Raises:
        InvalidRequest: Not 1 to 128 letters, digits, dots, dashes and underscores.
    """
    if value is None:
        raise invalid(field, "Missing: a name.")
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise invalid(
            field,
            "A name is 1 to 128 letters, digits, dots, dashes or _, and begins with a letter or "
            "digit.",
        )
    return value


def check_id(value: str) -> str:
    """A session id.

    Raises:
        InvalidRequest: Not 1 to 128 letters, digits, dots, dashes and underscores.
    """
    if not _ID.fullmatch(value) or ".." in value:
        raise invalid(
            "id",
            "A session id is 1 to 128 letters, digits, dots, dashes or _, begins with a letter or "
            "digit, and has no two dots in a row.",
        )
    return value


def one_of_each(pairs: Iterable[tuple[str, str]], many: tuple[str, ...] = ()) -> dict[str, str]:
    """A query as a mapping, without the names that may repeat.

    Raises:
        BadRequest: A name that is given twice.
    """
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in many:
            continue
        if name in found:
            raise BadRequest(f"{name[:80]!r} is given twice in the query; give it once.")
        found[name] = value
    return found
