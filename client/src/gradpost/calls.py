"""One call over a transport: headers, answers, refusals."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from gradpost.errors import RefusedError, TransportError, refusal
from gradpost.protocol import JSON
from gradpost.transport import Answer, Part, Transport, read_all

T = TypeVar("T")
Query = Sequence[tuple[str, str]]


def path_of(session: str, *rest: str, query: Query = ()) -> str:
    """The path of a session's resource."""
    path = "/".join(["/v1/sessions", quote(session, safe=""), *rest])
    return f"{path}?{urlencode(query)}" if query else path


class Calls:
    """Sends single attempts; a refusal is raised as the error of its problem type.

    Args:
        transport: The way to the server.
        api_key: Sent as a bearer key.
    """

    def __init__(self, transport: Transport, api_key: str | None) -> None:
        self._transport = transport
        self._fixed = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def send(
        self,
        method: str,
        path: str,
        read: Callable[[Answer], T],
        timeout_s: float,
        *,
        headers: Mapping[str, str] | None = None,
        body: Sequence[Part] = (),
    ) -> T:
        """One attempt; `read` takes the answer of a 2xx or a 304.

        Raises:
            TransportError: No whole answer came.
            RefusedError: The server refused.
        """
        sent = {**self._fixed, **(headers or {})}
        answer = self._transport.request(method, path, sent, body, timeout_s)
        try:
            if answer.status >= 300 and answer.status != 304:
                raise _refusal(answer)
            try:
                return read(answer)
            except (KeyError, TypeError, ValueError) as error:
                raise TransportError(
                    f"The answer to {method} {path.partition('?')[0]} is not what a gradpost "
                    f"server says ({error!r}); is a proxy in between?"
                ) from error
        finally:
            answer.release()

    def document(
        self,
        method: str,
        path: str,
        timeout_s: float,
        value: Any = None,
        needs: tuple[str, ...] = (),
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """One attempt with JSON both ways; an empty answer is {}.

        Raises:
            TransportError: As `send`, or a member that the caller `needs` is not there.
        """
        body: list[Part] = []
        sent = dict(headers or {})
        if value is not None:
            body = [_json(value)]
            sent["Content-Type"] = JSON
        return self.send(
            method, path, lambda answer: members(answer, needs), timeout_s,
            headers=sent, body=body,
        )  # fmt: skip

    def close(self) -> None:
        """Closes the transport."""
        self._transport.close()


def read_json(answer: Answer) -> dict[str, Any]:
    """The JSON object of an answer; {} where there is none."""
    body = read_all(answer)
    if not body:
        return {}
    try:
        found = json.loads(body)
    except ValueError as error:
        raise TransportError("The answer is not JSON; is this a gradpost server?") from error
    if not isinstance(found, dict):
        raise TransportError("The answer is not a JSON object; is this a gradpost server?")
    return found


def members(answer: Answer, needs: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of an answer, which has these members.

    Raises:
        KeyError: It lacks one.
    """
    found = read_json(answer)
    for name in needs:
        found[name]
    return found


def _json(value: Any) -> bytes:
    """A JSON body; NumPy's scalars are numbers."""
    try:
        return json.dumps(value, allow_nan=False, default=_plain).encode()
    except ValueError:
        raise ValueError(f"JSON has no NaN and no infinity: {value!r}") from None


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"{value!r} is no number, text, list or mapping of JSON.")


def _refusal(answer: Answer) -> RefusedError:
    """The refusal; one that breaks off is raised as such, for its type would be a guess."""
    body = read_all(answer)
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": f"The server answered {answer.status} without a problem document."}
    pause = answer.headers.get("Retry-After") or ""
    return refusal(answer.status, problem, float(pause) if pause.isdecimal() else None)
