"""A session on a server, as a trainer uses it: push gradients, pull parameters."""

import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradpost.calls import Calls, members, path_of, read_json
from gradpost.errors import (
    ClosedError,
    NotPulled,
    PreconditionFailed,
    SessionGone,
    TransportError,
)
from gradpost.http import Http
from gradpost.protocol import EPOCH, JSON, SAFETENSORS, SUMMARY, VERSION
from gradpost.protocol.versions import format_version
from gradpost.retry import Retrier, RetryPolicy
from gradpost.summary import Summary
from gradpost.tensors import Received, Tensors, decode, encode
from gradpost.transport import Answer, Part, Transport

Params = dict[str, NDArray[Any]]
Version = tuple[int, int]
T = TypeVar("T")

_BINARY = {"Content-Type": SAFETENSORS}


class State(NamedTuple):
    """The optimizer state: `<slot>/<tensor>` → array, and how often each tensor was updated."""

    tensors: Params
    counts: dict[str, int]
    step: int
    rule: str


class Buffer:
    """Memory for pulled parameters, to be used again: pass it as `into`."""

    def __init__(self) -> None:
        self.flat: NDArray[np.uint8] | None = None


class Session:
    """One trainer's view of a session. Make it by `create` or `attach`; use it as a context.

    Worker identity, sequence numbers, base versions and retries are kept here: a call that returns
    has happened exactly once, and one that raises `RefusedError` has changed nothing. May be used
    by several threads; the calls that return futures run in order in one thread of their own.

    Attributes:
        id: The session's id on the server.
        worker: This trainer's id, new for each incarnation.
        version: (epoch, version) of the parameters pulled last, or uploaded by this object;
            gradients count as computed there. None before that.
        retries: Attempts beyond the first, so far.
    """

    def __init__(
        self,
        transport: Transport,
        id: str,
        *,
        api_key: str | None = None,
        worker: str | None = None,
        policy: RetryPolicy | None = None,
        seed: int | None = None,
        close_transport: bool = False,
    ) -> None:
        self.id = id
        self._close_transport = close_transport
        prefix = re.sub(r"[^A-Za-z0-9._-]", "-", worker or "worker")[:100]
        self.worker = f"{prefix}-{uuid.uuid4().hex[:12]}"
        self.version: Version | None = None
        self._calls = Calls(transport, api_key)
        self._retrier = Retrier(policy or RetryPolicy(), seed)
        self._lock = threading.Lock()
        self._sequence = 0
        self._master = "F32"
        self._thread: ThreadPoolExecutor | None = None
        self._closed = False

    @classmethod
    def create(
        cls,
        url: str | Transport,
        id: str | None = None,
        *,
        params: Tensors | None = None,
        rule: str | None = None,
        optimizer: Mapping[str, Any] | None = None,
        dtype: str | None = None,
        update: Mapping[str, Any] | None = None,
        on_nonfinite: str | None = None,
        api_key: str | None = None,
        worker: str | None = None,
        policy: RetryPolicy | None = None,
        seed: int | None = None,
        proxy: str | None = None,
        ca_certs: str | None = None,
        **hyperparameters: Any,
    ) -> "Session":
        """Creates a session, or attaches to the one of this id if it was created alike.

        Args:
            url: Where the server is, as `Http` takes it, or a transport.
            id: Chosen by you; a random one where None. Several workers that give the same id share
                the session, and the first one's parameters are taken.
            params: Name → array, the whole model, in the order of its layout.
            rule: As adam; with its hyperparameters as keywords (lr=0.001, …).
            optimizer: Instead of rule and keywords: {"rule": "adam", "lr": 0.001}.
            dtype: Of parameters and state on the server, F32 (default) or F64.
            update: As {"max_staleness": 8}.
            on_nonfinite: "refuse" (default) or "skip".
            api_key: The server's key; the environment's GRADPOST_API_KEY where None.
            worker: A name for this trainer; a random part is appended.
            policy: Deadlines and retries.
            seed: Of the retries' jitter.
            proxy: As `Http` takes it.
            ca_certs: As `Http` takes it.
            hyperparameters: With `rule`.

        Raises:
            SpecDiffers: The session exists and was created otherwise.
            GradpostError: As for every call.
        """
        if (optimizer is None) == (rule is None):
            raise TypeError("Give rule='adam' with its hyperparameters, or optimizer={...}.")
        chosen = dict(optimizer) if optimizer is not None else {"rule": rule, **hyperparameters}
        spec: dict[str, Any] = {"optimizer": chosen}
        stated = {"dtype": dtype, "update": update, "on_nonfinite": on_nonfinite}
        spec.update({name: value for name, value in stated.items() if value is not None})
        session = cls._open(
            url, id or uuid.uuid4().hex, proxy, ca_certs, api_key, worker, policy, seed
        )
        session._note(session._document("PUT", path_of(session.id), spec, ("dtype",)))
        if params is not None:
            session._initialise(params)
        return session

    @classmethod
    def attach(
        cls,
        url: str | Transport,
        id: str,
        *,
        api_key: str | None = None,
        worker: str | None = None,
        policy: RetryPolicy | None = None,
        seed: int | None = None,
        proxy: str | None = None,
        ca_certs: str | None = None,
    ) -> "Session":
        """Joins a session that exists, whatever it was created with.

        Raises:
            SessionUnknown: There is none of this id.
        """
        session = cls._open(url, id, proxy, ca_certs, api_key, worker, policy, seed)
        session.info()
        return session

    @classmethod
    def _open(
        cls,
        url: str | Transport,
        id: str,
        proxy: str | None,
        ca_certs: str | None,
        api_key: str | None,
        worker: str | None,
        policy: RetryPolicy | None,
        seed: int | None,
    ) -> "Session":
        ours = isinstance(url, str)
        transport = Http(url, proxy=proxy, ca_certs=ca_certs) if isinstance(url, str) else url
        return cls(
            transport,
            id,
            api_key=api_key or os.environ.get("GRADPOST_API_KEY"),
            worker=worker,
            policy=policy,
            seed=seed,
            close_transport=ours,
        )

    # Training

    def push(
        self,
        grads: Tensors,
        *,
        loss: float | None = None,
        base_version: Version | None = None,
    ) -> Summary:
        """Posts a gradient; returns when it was applied, exactly once.

        Args:
            grads: Name → array, every tensor of the session, in any order.
            loss: For the history.
            base_version: Of the parameters the gradient was computed from; those pulled last where
                None.

        Raises:
            NotPulled: Nothing was pulled or uploaded yet, and `base_version` is not given.
            StaleGradient: The model moved on too far; pull and compute again.
            EpochChanged: Its history was cut; pull and compute again.
            RefusedError: Anything else the server refuses.
            DeadlineExceeded: Nobody answered in time; whether it was applied is not known.
        """
        path, body = self._push_of(grads, loss, base_version, ())
        return self._run(
            lambda timeout: self._calls.send(
                "POST",
                path,
                lambda answer: Summary.of(read_json(answer)),
                timeout,
                headers=_BINARY,
                body=body,
            )
        )

    def push_pull(
        self,
        grads: Tensors,
        *,
        loss: float | None = None,
        base_version: Version | None = None,
        into: Buffer | None = None,
        dtype: str | None = None,
    ) -> tuple[Summary, Params]:
        """Posts a gradient and gets the parameters after it, in one request.

        Args:
            grads: As for `push`.
            loss: For the history.
            base_version: As for `push`.
            into: Memory to use again; arrays returned earlier with it are overwritten.
            dtype: Of the answer: F32, F64, F16, BF16 (as uint16), or model.

        Raises:
            GradpostError: As `push`.
        """
        asked = () if dtype is None else (("dtype", dtype),)
        path, body = self._push_of(grads, loss, base_version, asked)
        headers = {**_BINARY, "Accept": SAFETENSORS}
        summary, received = self._run(
            lambda timeout: self._calls.send(
                "POST",
                path,
                lambda answer: self._answered(answer, into),
                timeout,
                headers=headers,
                body=body,
            )
        )
        if received is None:  # applied, but its parameters can't be had in this form: pull says why
            return summary, self.pull(into=into, dtype=dtype)
        return summary, received

    def pull(
        self,
        *,
        names: Sequence[str] | None = None,
        dtype: str | None = None,
        min_version: Version | None = None,
        wait_s: float | None = None,
        into: Buffer | None = None,
    ) -> Params:
        """Gets the newest parameters, whole and of one version.

        Args:
            names: Only these tensors.
            dtype: F32, F64, F16, BF16 (as uint16), or model (each as it was uploaded).
            min_version: Nothing older than this (epoch, version).
            wait_s: How long the server may wait for `min_version`.
            into: Memory to use again; arrays returned earlier with it are overwritten.

        Raises:
            VersionPending: `min_version` was not reached in time.
        """
        query = [("names", name) for name in names or ()]
        query += [("dtype", dtype)] if dtype else []
        query += [("min_version", format_version(*min_version))] if min_version else []
        headers = {"Accept": SAFETENSORS}
        if wait_s is not None:
            headers["Prefer"] = f"wait={wait_s:g}"
        path = path_of(self.id, "params", query=query)
        received, said = self._run(
            lambda timeout: self._calls.send(
                "GET", path, lambda answer: _tensors(answer, into), timeout, headers=headers
            ),
            final=("version-pending",),
        )
        self._pulled(said)
        return received.tensors

    def push_async(self, grads: Tensors, **options: Any) -> "Future[Summary]":
        """As `push`, in the background; `grads` must stay as they are until it is done."""
        return self._later(lambda: self.push(grads, **options))

    def push_pull_async(self, grads: Tensors, **options: Any) -> "Future[tuple[Summary, Params]]":
        """As `push_pull`, in the background; `grads` must stay as they are until it is done."""
        return self._later(lambda: self.push_pull(grads, **options))

    # Everything else

    def info(self) -> dict[str, Any]:
        """Everything the server says of the session."""
        found = self._document("GET", path_of(self.id), needs=("dtype",))
        self._note(found)
        return found

    def patch(self, **changes: Any) -> dict[str, Any]:
        """Changes hyperparameters from the next update on: `patch(optimizer={"lr": 1e-4})`."""
        return self._document("PATCH", path_of(self.id), changes)

    def history(self, *, limit: int = 1000, after_step: int = 0) -> list[dict[str, Any]]:
        """The last steps, the oldest first."""
        query = [("limit", str(limit)), ("after_step", str(after_step))]
        path = path_of(self.id, "history", query=query)
        return list(self._document("GET", path, needs=("steps",))["steps"])

    def set_params(self, params: Tensors, *, first_only: bool = False) -> None:
        """Uploads parameters, all or some; the moments stay and a new epoch begins.

        Raises:
            PreconditionFailed: `first_only` and there are some already.
        """
        body = encode(params, self._master)
        headers = dict(_BINARY)
        if first_only:
            headers["If-None-Match"] = "*"
        self._replace("params", headers, body)

    def state(self) -> State:
        """The whole optimizer state."""
        path = path_of(self.id, "state")
        return self._run(
            lambda timeout: self._calls.send(
                "GET", path, _state, timeout, headers={"Accept": SAFETENSORS}
            )
        )

    def set_state(self, state: State) -> None:
        """Replaces the whole optimizer state; the parameters stay and a new epoch begins."""
        facts = {
            "counts": json.dumps(state.counts),
            "step": str(state.step),
            "rule": state.rule,
        }
        body = encode(state.tensors, self._master, facts)
        self._replace("state", _BINARY, body)

    def delete(self) -> None:
        """Ends the session on the server, for every worker."""
        try:
            self._document("DELETE", path_of(self.id))
        except SessionGone:  # the answer to an earlier attempt was lost, or another worker's delete
            return

    @property
    def retries(self) -> int:
        """Attempts beyond the first, so far."""
        return self._retrier.retries

    def close(self) -> None:
        """Waits for what runs in the background and closes the connections; the session stays."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=True)
        if self._close_transport:  # one that was handed in may serve other sessions
            self._calls.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _initialise(self, params: Tensors) -> None:
        """Uploads the parameters, unless another worker was first."""
        try:
            self.set_params(params, first_only=True)
        except PreconditionFailed:
            return  # the first one's parameters hold; pull them

    def _answered(self, answer: Answer, into: Buffer | None) -> tuple[Summary, Params | None]:
        """The summary of a push, and the parameters if the server sent them."""
        if (answer.headers.get("Content-Type") or "").startswith(JSON):
            return Summary.of(read_json(answer)), None
        received, said = _tensors(answer, into)
        self._pulled(said)
        return Summary.of(json.loads(said[SUMMARY])), received.tensors

    def _push_of(
        self,
        grads: Tensors,
        loss: float | None,
        base: Version | None,
        more: Sequence[tuple[str, str]],
    ) -> tuple[str, list[Part]]:
        body = encode(grads, self._master, one_dtype=True)
        with self._lock:
            base = base or self.version
            if base is None:
                raise NotPulled(
                    "Pull before the first push: it says which parameters a gradient was computed "
                    "from (or pass base_version)."
                )
            self._sequence += 1
            sequence = self._sequence
        query = [
            ("worker", self.worker),
            ("sequence", str(sequence)),
            ("base_version", format_version(*base)),
            *more,
        ]
        if loss is not None:
            query.append(("loss", repr(float(loss))))
        return path_of(self.id, "steps", query=query), body

    def _run(self, attempt: Callable[[float], T], *, final: tuple[str, ...] = ()) -> T:
        if self._closed and threading.current_thread().name.partition("_")[0] != "gradpost":
            raise ClosedError("This session object was closed; attach again.")
        return self._retrier.run(attempt, final=final)

    def _document(
        self, method: str, path: str, value: Any = None, needs: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        return self._run(lambda timeout: self._calls.document(method, path, timeout, value, needs))

    def _replace(self, what: str, headers: Mapping[str, str], body: Sequence[Part]) -> None:
        """Uploads parameters or state and takes the version that results."""
        path = path_of(self.id, what)

        def read(answer: Answer) -> tuple[int, int]:
            found = members(answer, ("epoch", "version"))
            return int(found["epoch"]), int(found["version"])

        version = self._run(
            lambda timeout: self._calls.send("PUT", path, read, timeout, headers=headers, body=body)
        )
        with self._lock:
            self.version = version

    def _later(self, call: Callable[[], T]) -> "Future[T]":
        with self._lock:
            if self._closed:
                raise ClosedError("This session object was closed; attach again.")
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="gradpost")
            return self._thread.submit(call)

    def _note(self, found: Mapping[str, Any]) -> None:
        """Takes the dtype from a description."""
        self._master = str(found["dtype"])

    def _pulled(self, said: Mapping[str, str]) -> None:
        with self._lock:
            self.version = (int(said[EPOCH]), int(said[VERSION]))


def _state(answer: Answer) -> State:
    received = decode(answer, None)
    facts = received.metadata
    counts = {str(name): int(count) for name, count in json.loads(facts["counts"]).items()}
    return State(received.tensors, counts, int(facts["step"]), facts["rule"])


def _tensors(answer: Answer, into: Buffer | None) -> tuple[Received, dict[str, str]]:
    """Tensors of an answer, and the headers that say what they are."""
    said = {name: answer.headers.get(name) for name in (EPOCH, VERSION, SUMMARY)}
    if said[EPOCH] is None or said[VERSION] is None:
        raise TransportError("The answer names no version; is this a gradpost server?")
    received = decode(answer, None if into is None else into.flat)
    if into is not None:
        into.flat = received.buffer
    return received, {name: text for name, text in said.items() if text is not None}
