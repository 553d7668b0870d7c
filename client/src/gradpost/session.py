"""A session on a server, as a trainer uses it: push gradients, pull parameters."""

import json
import math
import os
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlencode

import numpy as np

from gradpost import compress as compression
from gradpost.answers import (
    Buffer,
    Form,
    Params,
    State,
    Version,
    changes_of,
    state_of,
    summary_of,
    tensors_of,
)
from gradpost.calls import Calls, members, path_of
from gradpost.checkpoints import Checkpoints
from gradpost.errors import (
    ClosedError,
    DeadlineExceeded,
    GradpostError,
    NotPulled,
    PreconditionFailed,
    RefusedError,
    SessionGone,
    refusal,
)
from gradpost.http import Http
from gradpost.pending import Push, Tries, Unsettled
from gradpost.protocol import (
    EPOCH,
    INCARNATION,
    JSON,
    PROBLEM_PREFIX,
    SAFETENSORS,
    SUMMARY,
    VERSION,
)
from gradpost.protocol.versions import format_version
from gradpost.retry import Retrier, RetryPolicy
from gradpost.summary import Summary
from gradpost.tensors import Tensors, encode
from gradpost.transport import Answer, Part, Transport
from gradpost.uploads import Base, Upload

Overrides = Mapping[str, Mapping[str, Any]]
Compress = str | compression.Codec | compression.ErrorFeedback | None
T = TypeVar("T")

_BINARY = {"Content-Type": SAFETENSORS}


class Session:
    """One trainer's view of a session. Make it by `create` or `attach`; use it as a context.

    Worker identity, sequence numbers, base versions and retries are kept here: a call that returns
    has happened exactly once. A push that raises a refusal (4xx) was not applied. One that ends
    without an answer to trust (`DeadlineExceeded`, an interrupt) is `pending`: its bytes are kept,
    and `settle` or the next push sends them again, so that it is applied once, not twice, and not
    lost while this object lives. May be used by several threads; the calls that return futures run
    in order in one thread of their own.

    Attributes:
        id: The session's id on the server.
        worker: This trainer's id, new for each incarnation.
        attached: True if `create` found the session there; its parameters are then not yours.
        version: (epoch, version) of the parameters pulled last, or that this object's last upload
            resulted in; gradients count as computed there. None before that.
        checkpoints: Files on the server with parameters and state: make, download, restore.
        compress: What makes gradients smaller before they are sent; None: nothing does. The state
            of an `ErrorFeedback` belongs into the trainer's own checkpoints.
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
        compress: Compress = None,
    ) -> None:
        self.id = id
        self._close_transport = close_transport
        prefix = re.sub(r"[^A-Za-z0-9._-]", "-", worker or "worker")[:100]
        self.worker = f"{prefix}-{uuid.uuid4().hex[:12]}"
        self.attached = False
        self.version: Version | None = None
        self._calls = Calls(transport, api_key)
        self._retrier = Retrier(policy or RetryPolicy(), seed)
        self._lock = threading.Lock()
        self._sequence = 0
        self._unsettled = Unsettled()
        self._master = "F32"
        self._incarnation: str | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._admitted = threading.local()
        self._closed = False
        self.compress = compression.chosen(compress)
        self.checkpoints = Checkpoints(id, self._document, self._request, self._replace)

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
        groups: Sequence[Mapping[str, Any]] | None = None,
        clip: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        ema: Mapping[str, Any] | None = None,
        norms: bool | None = None,
        missing: str | None = None,
        durability: str | None = None,
        log_slots: int | None = None,
        api_key: str | None = None,
        worker: str | None = None,
        policy: RetryPolicy | None = None,
        seed: int | None = None,
        proxy: str | None = None,
        ca_certs: str | None = None,
        compress: Compress = None,
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
            groups: Of tensors with hyperparameters of their own: [{"params": ["*.bias"],
                "weight_decay": 0.0}].
            clip: As {"global_norm": 1.0}.
            schedule: Of the learning rate, as {"kind": "cosine", "total_steps": 10000}.
            ema: As {"decay": 0.999}: keep an average of the parameters, pulled as of="ema".
            norms: Measure update_norm and param_norm too.
            missing: A push without some tensors is refused ("refuse", the default), or they stay
                as they are ("skip").
            durability: none, snapshot or log: what a crash of the server leaves.
            log_slots: Pushes that the log holds between two snapshots.
            api_key: The server's key; the environment's GRADPOST_API_KEY where None.
            worker: A name for this trainer; a random part is appended.
            policy: Deadlines and retries.
            seed: Of the retries' jitter.
            proxy: As `Http` takes it.
            ca_certs: As `Http` takes it.
            compress: Of gradients, on their way: "int8", "topk:0.01" (a part of each tensor, or
                how many values), "bf16", "f16", or one of gradpost.compress. What int8 and topk
                lose is added to the next gradient. It is no property of the session.
            hyperparameters: With `rule`.

        Raises:
            SpecDiffers: The session exists and was created otherwise.
            GradpostError: As for every call.
        """
        if (optimizer is None) == (rule is None):
            raise TypeError("Give rule='adam' with its hyperparameters, or optimizer={...}.")
        chosen = dict(optimizer) if optimizer is not None else {"rule": rule, **hyperparameters}
        spec: dict[str, Any] = {"optimizer": chosen}
        stated = {
            "dtype": dtype, "update": update, "on_nonfinite": on_nonfinite, "groups": groups,
            "clip": clip, "schedule": schedule, "ema": ema, "norms": norms, "missing": missing,
            "durability": durability, "log_slots": log_slots,
        }  # fmt: skip
        spec.update({name: value for name, value in stated.items() if value is not None})
        session = cls._open(
            url, id or uuid.uuid4().hex, proxy, ca_certs, api_key, worker, policy, seed, compress
        )
        try:
            found = session._document("PUT", path_of(session.id), spec, ("dtype",))
            session._note(found)
            session.attached = bool(found.get("attached"))
            if params is not None:
                session._initialise(params)
        except BaseException:
            session.close()
            raise
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
        compress: Compress = None,
    ) -> "Session":
        """Joins a session that exists, whatever it was created with.

        Raises:
            SessionUnknown: There is none of this id.
        """
        session = cls._open(url, id, proxy, ca_certs, api_key, worker, policy, seed, compress)
        try:
            session.info()
        except BaseException:
            session.close()
            raise
        session.attached = True
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
        compress: Compress,
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
            compress=compress,
        )

    # Training

    def push(
        self,
        grads: Tensors,
        *,
        loss: float | None = None,
        base_version: Version | None = None,
        overrides: Overrides | None = None,
        grad_scale: float | None = None,
    ) -> Summary:
        """Posts a gradient; returns when it was applied, exactly once.

        A pending push is settled first, in the same deadline. If that is refused or fails, its
        error is raised, with a note, and this gradient was not sent.

        Args:
            grads: Name → array, every tensor of the session, in any order; `Rows` for one of
                which only some rows have a gradient.
            loss: For the history; left out there if it is not finite.
            base_version: Of the parameters the gradient was computed from; those pulled last where
                None.
            overrides: Hyperparameters of this update, as {"default": {"lr": 0.1}}, by group.
            grad_scale: The gradient is divided by it.

        Raises:
            NotPulled: Nothing was pulled or uploaded yet, and `base_version` is not given.
            StaleGradient: The model moved on too far; pull and compute again.
            EpochChanged: Its history was cut; pull and compute again.
            RefusedError: Anything else the server refuses.
            DeadlineExceeded: No answer in time; the push is pending (`kept` is its sequence), so
                do not push this gradient again. If `kept` is None it was not sent.
        """
        control = _control(overrides, grad_scale)
        return self._push(grads, loss, base_version, control, summary_of, _BINARY)

    def push_pull(
        self,
        grads: Tensors,
        *,
        loss: float | None = None,
        base_version: Version | None = None,
        overrides: Overrides | None = None,
        grad_scale: float | None = None,
        into: Buffer | None = None,
        dtype: str | None = None,
    ) -> tuple[Summary, Params]:
        """Posts a gradient and gets the parameters after it, in one request.

        As `push`, a pending one included: `settle` then returns its summary, and `pull` the
        parameters.

        Args:
            grads: As for `push`.
            loss: For the history.
            base_version: As for `push`.
            overrides: As for `push`.
            grad_scale: As for `push`.
            into: Memory to use again; arrays returned earlier with it are overwritten.
            dtype: Of the answer: F32, F64, F16, BF16 (as uint16), or model.

        Raises:
            GradpostError: As `push`. Where `summary` is set the gradient was applied, and only the
                parameters did not come: pull them.
        """
        summary, received = self._push(
            grads,
            loss,
            base_version,
            _control(overrides, grad_scale),
            lambda answer: self._answered(answer, into, (dtype, None)),
            {**_BINARY, "Accept": SAFETENSORS},
            "" if dtype is None else "&" + urlencode({"dtype": dtype}),
        )
        if received is not None:
            return summary, received
        try:  # applied, but its parameters can't be had in this form: pull says why
            return summary, self.pull(into=into, dtype=dtype)
        except GradpostError as error:
            error.of_applied(summary)
            raise

    @property
    def pending(self) -> int | None:
        """Sequence of the oldest push that may have been applied and that no answer settled.

        None if there is none. Several threads may leave several: `settle` takes them one by one.
        """
        push = self._unsettled.oldest
        return None if push is None else push.sequence

    def settle(self, deadline_s: float | None = None) -> Summary | None:
        """Sends the oldest pending push again, the same bytes, until an answer settles it.

        `version` stays as it is: the parameters after the push are yours only when you pull them.

        Args:
            deadline_s: Seconds for this call; as the policy says where None.

        Returns:
            What the push did, `replayed` if an earlier attempt had arrived; None if none is
            pending.

        Raises:
            RefusedError: A 4xx of the session: the push was not applied (of `too-old` and
                `worker-retired`: nobody can tell any more), and is not pending any longer. If it
                still is, the refusal (a wrong key, a proxy's) does not tell what became of it.
            DeadlineExceeded: No answer in time; it stays pending, settle again.
        """
        self._check_open()
        return self._settle(self._retrier.end(deadline_s))

    def pull(
        self,
        *,
        names: Sequence[str] | str | None = None,
        dtype: str | None = None,
        min_version: Version | None = None,
        wait_s: float | None = None,
        into: Buffer | None = None,
        of: str | None = None,
        since: bool = False,
    ) -> Params:
        """Gets the newest parameters, whole and of one version.

        Args:
            names: Only these tensors, or this one.
            dtype: F32, F64, F16, BF16 (as uint16), or model (each as it was uploaded).
            min_version: Nothing older than this (epoch, version).
            wait_s: How long the server may wait for `min_version`.
            into: Memory to use again; arrays returned earlier with it are overwritten.
            of: "ema": the average of the parameters, where the session keeps one. Gradients go on
                counting as computed where they were.
            since: Ask only for the tensors that differ from those in `into`, which must be as they
                were received; they are put in their places there. All come if the server can't
                tell any more.

        Raises:
            VersionPending: `min_version` was not reached in time.
            TypeError: `since` without `into`, or of the average, all of which changes each time.
        """
        if since and (into is None or of == "ema"):
            raise TypeError("since=True takes into=Buffer(), and not of='ema'.")
        chosen = [names] if isinstance(names, str) else names or ()
        query = [("names", name) for name in chosen]
        query += [("dtype", dtype)] if dtype else []
        query += [("min_version", format_version(*min_version))] if min_version else []
        query += [("of", of)] if of else []
        headers = {"Accept": SAFETENSORS}
        if wait_s is not None:
            headers["Prefer"] = f"wait={wait_s:g}"
        form = None if of == "ema" else (dtype, tuple(sorted(chosen)) or None)

        def read(answer: Answer) -> tuple[Params | None, dict[str, str]]:
            if since and into is not None and form is not None:
                return changes_of(answer, into, form)
            received, said = tensors_of(answer, into, form)
            return received.tensors, said

        def attempt(timeout: float) -> tuple[Params | None, dict[str, str]]:
            base = into.holds(form) if since and into and form else None  # a retry may have less
            asked = [*query, ("since", format_version(*base))] if base else query
            path = path_of(self.id, "params", query=asked)
            return self._calls.send("GET", path, read, timeout, headers=headers)

        found, said = self._run(attempt, final=("version-pending",))
        if found is None:  # the session was created anew, or has other tensors by now
            return self.pull(
                names=names, dtype=dtype, min_version=min_version, wait_s=wait_s, into=into
            )
        if of != "ema":
            self._pulled(said)
        return found

    def push_async(self, grads: Tensors, **options: Any) -> "Future[Summary]":
        """As `push`, in the background; `grads` must stay as they are until it is done.

        One that is left pending is settled by the next, whose future tells if that fails.
        """
        return self._later(lambda: self.push(grads, **options))

    def push_pull_async(self, grads: Tensors, **options: Any) -> "Future[tuple[Summary, Params]]":
        """As `push_pull`, in the background; `grads` must stay as they are until it is done.

        One that is left pending is settled by the next, whose future tells if that fails.
        """
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

    def schedule(self, steps: int = 100) -> dict[str, list[float]]:
        """The learning rates of the next updates, by group, as the server's schedule has them."""
        path = path_of(self.id, "schedule", query=[("steps", str(steps))])
        found = self._document("GET", path, needs=("lr",))["lr"]
        return {str(name): [float(rate) for rate in rates] for name, rates in found.items()}

    def add_group(self, name: str, params: Tensors, **hyperparameters: Any) -> dict[str, Any]:
        """Adds a group of new tensors; all others keep parameters, state and counts.

        If the session has this very group already, its tensors stay as they are.

        Args:
            name: Of the group.
            params: Name → array, its tensors.
            hyperparameters: Its own; the session's hold for the rest.

        Returns:
            The server's description of the session.

        Raises:
            SpecDiffers: There is another group of this name.
            TensorMismatch: A tensor that the session has already.
        """
        group = json.dumps({"name": name, **hyperparameters}, allow_nan=False)
        path = path_of(self.id, "groups", query=[("group", group)])
        body = encode(params, self._master)

        def read(answer: Answer) -> tuple[int, dict[str, Any]]:
            return answer.status, members(answer, ("epoch", "version", "dtype"))

        status, found = self._run(
            lambda timeout: self._calls.send(
                "POST", path, read, timeout, headers=_BINARY, body=body
            )
        )
        now = int(found["epoch"]), int(found["version"])
        with self._lock:  # nobody pushed in between: the others are still those pulled last
            if status == 201 and self.version == (now[0], now[1] - 1):
                self.version = now
        return found

    def set_params(self, params: Tensors, *, first_only: bool = False) -> None:
        """Uploads parameters, all or some; the moments stay and a new epoch begins.

        Whatever is there is replaced, steps that other workers make meanwhile included. It is
        replaced once: an upload asks for the epoch first and is conditional on it, so when an
        answer is lost, the retry of an upload that had arrived does not overwrite the steps made
        since. Such a retry is refused, and an epoch that was raised exactly once says that the
        upload was taken. (Another upload in that very moment looks the same: where several workers
        may upload at once, let one of them do it.)

        Args:
            params: Name → array.
            first_only: Only if there are none yet.

        Raises:
            PreconditionFailed: `first_only` and there are some already, perhaps from an attempt of
                this call whose answer was lost: pull. Else: an answer was lost and there were
                several uploads since, so whether this one was taken can't be told.
            DeadlineExceeded: No answer in time; whether they were taken is not known, and nothing
                is kept. `info` and `pull` tell; the same call again is another upload.
        """
        self._replace("params", encode(params, self._master), first_only=first_only)

    def state(self) -> State:
        """The whole optimizer state."""
        path = path_of(self.id, "state")
        return self._run(
            lambda timeout: self._calls.send(
                "GET", path, state_of, timeout, headers={"Accept": SAFETENSORS}
            )
        )

    def set_state(self, state: State) -> None:
        """Replaces the whole optimizer state; the parameters stay and a new epoch begins.

        Replaced once, and with the same errors, as `set_params` says.
        """
        facts = {
            "counts": json.dumps(state.counts),
            "step": str(state.step),
            "rule": state.rule,
        }
        if state.scalars:
            facts["scalars"] = json.dumps({name: dict(own) for name, own in state.scalars.items()})
        self._replace("state", encode(state.tensors, self._master, facts))

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
        """Waits for what runs in the background and closes the connections; the session stays.

        Sends nothing: a push that is still pending is dropped, so settle it before.
        """
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
        """Uploads the parameters, unless another worker was first with the same tensors."""
        try:
            self.set_params(params, first_only=True)
        except PreconditionFailed:  # the first one's parameters hold; pull them
            self._check_layout(params)
        except RefusedError:
            if not self.attached:  # an empty session would stand in the way of the next attempt
                self.delete()
            raise

    def _check_layout(self, params: Tensors) -> None:
        rows = self._document("GET", path_of(self.id), needs=("layout",))["layout"]
        theirs = {str(row["name"]): tuple(row["shape"]) for row in rows}
        ours = {name: _shape(value) for name, value in params.items()}
        other = ours.items() - theirs.items()  # a group that was added since may have more
        if other:
            name, shape = min(other)
            detail = (
                f"Session {self.id!r} exists and its tensors are not those of params (it has no "
                f"{name!r} of shape {list(shape)}); leave params out, or take another id."
            )
            raise refusal(409, {"type": f"{PROBLEM_PREFIX}spec-differs", "detail": detail})

    def _answered(
        self, answer: Answer, into: Buffer | None, form: Form
    ) -> tuple[Summary, Params | None]:
        """The summary of a push, and the parameters if the server sent them."""
        if (answer.headers.get("Content-Type") or "").startswith(JSON):
            return summary_of(answer), None
        received, said = tensors_of(answer, into, form)
        summary = Summary.of(json.loads(said[SUMMARY]))
        self._pulled(said)
        return summary, received.tensors

    def _push(
        self,
        grads: Tensors,
        loss: float | None,
        base: Version | None,
        control: Sequence[tuple[str, str]],
        read: Callable[[Answer], T],
        headers: Mapping[str, str],
        asked: str = "",
    ) -> T:
        """Sends a push after those that are pending; kept if it ends with its fate unknown."""
        end = self._retrier.end()
        if self._unsettled:
            self._settle_all(end)
        push = self._push_of(grads, loss, base, control)
        tries = Tries(
            lambda timeout: self._calls.send(
                "POST", push.path + asked, read, timeout, headers=headers, body=push.body
            )
        )
        try:
            found = self._run(tries, end=end)
        except BaseException as error:  # an interrupt, too, may come after the server has acted
            if not tries.unsettled(error):
                push.settled(None)
            else:
                self._unsettled.keep(push)
                if isinstance(error, DeadlineExceeded):
                    error.keep(push.sequence)
                else:
                    error.add_note(f"Push {push.sequence} may have been applied; call settle().")
            raise
        push.settled(found)
        return found

    def _settle_all(self, end: float) -> None:
        """Makes way for the next push."""
        try:
            while self._unsettled:
                self._settle(end)
            if self._retrier.left_s(end) <= 0:
                raise DeadlineExceeded("Settling the push before this one took all the time.")
        except GradpostError as error:
            error.add_note("The gradient of this call was not sent.")
            raise

    def _settle(self, end: float) -> Summary | None:
        return self._unsettled.settle(
            lambda push: self._run(
                lambda timeout: self._calls.send(
                    "POST", push.path, summary_of, timeout, headers=_BINARY, body=push.body
                ),
                end=end,
            ),
            self._retrier.left_s(end),
        )

    def _push_of(
        self,
        grads: Tensors,
        loss: float | None,
        base: Version | None,
        control: Sequence[tuple[str, str]],
    ) -> Push:
        if base is not None and not _is_version(base):
            raise TypeError(f"base_version is (epoch, version), as session.version; not {base!r}.")
        body, settled = compression.encoded(self.compress, grads, self._master)
        with self._lock:
            base = base or self.version
            if base is None:
                settled(None)
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
            *control,
        ]
        if self._incarnation is not None:
            query.append(("incarnation", self._incarnation))
        if loss is not None and math.isfinite(loss):  # a history has no NaN; such a step may count
            query.append(("loss", repr(float(loss))))
        return Push(sequence, path_of(self.id, "steps", query=query), body, settled)

    def _run(
        self,
        attempt: Callable[[float], T],
        *,
        final: tuple[str, ...] = (),
        end: float | None = None,
    ) -> T:
        self._check_open()
        return self._retrier.run(attempt, final=final, end=end)

    def _check_open(self) -> None:
        if self._closed and not getattr(self._admitted, "now", False):
            raise ClosedError("This session object was closed; attach again.")

    def _document(
        self, method: str, path: str, value: Any = None, needs: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        return self._run(lambda timeout: self._calls.document(method, path, timeout, value, needs))

    def _request(
        self, method: str, path: str, read: Callable[[Answer], T], headers: Mapping[str, str]
    ) -> T:
        return self._run(
            lambda timeout: self._calls.send(method, path, read, timeout, headers=headers)
        )

    def _replace(
        self,
        what: str,
        body: Sequence[Part],
        *,
        first_only: bool = False,
        method: str = "PUT",
        kind: str = SAFETENSORS,
        query: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Uploads parameters or state, once, and takes the version that results."""
        seen: list[str | None] = [None]

        def read(answer: Answer) -> Version:
            found = members(answer, ("epoch", "version"))
            seen.append(found.get("incarnation"))
            return int(found["epoch"]), int(found["version"])

        def look(timeout: float) -> Base:
            return Base(*self._calls.send("GET", path_of(self.id), read, timeout))

        def put(condition: Mapping[str, str], timeout: float) -> Version:
            headers = {"Content-Type": kind, **condition}
            path = path_of(self.id, what, query=query)
            return self._calls.send(method, path, read, timeout, headers=headers, body=body)

        if first_only:
            version = self._run(lambda timeout: put({"If-None-Match": "*"}, timeout))
        else:
            version = self._run(Upload(look, put))
        with self._lock:
            self.version = version
            self._incarnation = seen[-1] or self._incarnation

    def _later(self, call: Callable[[], T]) -> "Future[T]":
        """Queues a call, which `close` lets run to its end."""

        def admitted() -> T:
            self._admitted.now = True
            try:
                return call()
            finally:
                self._admitted.now = False

        with self._lock:
            if self._closed:
                raise ClosedError("This session object was closed; attach again.")
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="gradpost")
            return self._thread.submit(admitted)

    def _note(self, found: Mapping[str, Any]) -> None:
        """Takes the dtype and the incarnation from a description."""
        self._master = str(found["dtype"])
        if self._incarnation is None:  # later only with parameters: a gradient is of those
            self._incarnation = found.get("incarnation")

    def _pulled(self, said: Mapping[str, str]) -> None:
        with self._lock:
            self.version = (int(said[EPOCH]), int(said[VERSION]))
            self._incarnation = said.get(INCARNATION, self._incarnation)


def _shape(value: Any) -> tuple[int, ...]:
    return np.asarray(getattr(value, "bits", value)).shape


def _is_version(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(type(n) is int for n in value)


def _control(overrides: Overrides | None, grad_scale: float | None) -> list[tuple[str, str]]:
    """Control values of a push, as a query carries them."""
    found = []
    if overrides:
        text = json.dumps(overrides, allow_nan=False, separators=(",", ":"))  # a head has a limit
        found.append(("overrides", text))
    if grad_scale is not None:
        found.append(("grad_scale", repr(float(grad_scale))))
    return found
