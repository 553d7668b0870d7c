"""A session on a server, as a trainer uses it: push gradients, pull parameters."""

import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, overload
from urllib.parse import urlencode

import numpy as np

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
from gradpost.calls import members, path_of
from gradpost.checkpoints import Checkpoints
from gradpost.compress import Codec, ErrorFeedback
from gradpost.described import Described
from gradpost.errors import (
    EpochChanged,
    GradpostError,
    PreconditionFailed,
    RefusedError,
    refusal,
)
from gradpost.http import Http
from gradpost.protocol import JSON, PROBLEM_PREFIX, SAFETENSORS, SUMMARY
from gradpost.protocol.versions import format_version
from gradpost.pushes import BINARY, PLAIN, Compress, Overrides, Pushes, Reading, Terms
from gradpost.retry import RetryPolicy
from gradpost.rounds import Contribution
from gradpost.summary import Summary
from gradpost.tensors import Tensors, encode
from gradpost.training import Compute, train_step
from gradpost.transport import Answer, Transport
from gradpost.uploads import Uploads


class Session(Described):
    """One trainer's view of a session. Make it by `create` or `attach`; use it as a context.

    Worker identity, sequence numbers, base versions and retries are kept here: a call that returns
    has happened exactly once. A push that raises a refusal (4xx) was not applied. One that ends
    without an answer to trust (`DeadlineExceeded`, an interrupt) is `pending`: its bytes are kept,
    and `settle` or the next push sends them again, so that it is applied once, not twice, and not
    lost while this object lives. May be used by several threads; the calls that return futures run
    in order in one thread of their own. Where workers wait for each other this object is one of
    them from its making until `close`.

    Attributes:
        id: The session's id on the server.
        worker: This trainer's id, new for each incarnation.
        mode: The update mode: async, sync or bounded.
        takes: What a push carries: a "gradient", or the "delta" of a trainer's local steps.
        attached: True if `create` found the session there; its parameters are then not yours.
        version: (epoch, version) that gradients count as computed from.
        checkpoints: Files on the server with parameters and state: make, download, restore.
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
        prefix = re.sub(r"[^A-Za-z0-9._-]", "-", worker or "worker")[:100]
        named = f"{prefix}-{uuid.uuid4().hex[:12]}"
        super().__init__(
            transport, id, named, api_key, policy, seed, close_transport=close_transport
        )
        self.attached = False
        self._pushes = Pushes(id, self._standing, self._calls, self._retrier, self._run, compress)
        uploads = Uploads(id, self._standing, self._calls, self._run)
        self._replace = uploads.replace
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
        push: str | None = None,
        api_key: str | None = None,
        worker: str | None = None,
        join: bool | None = None,
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
            update: As {"max_staleness": 8}, or {"mode": "sync", "workers": 4,
                "round_timeout_s": 60}, or {"mode": "bounded", "slack": 3}.
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
            push: What a push carries: "gradient" (default), or "delta": what a trainer's local
                steps changed, end - start, as `LocalSteps` sends it.
            api_key: The server's key; the environment's GRADPOST_API_KEY where None.
            worker: A name for this trainer; a random part is appended.
            join: Take a place among the workers, with a lease that a thread renews, until `close`;
                None: in sync and bounded mode.
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
            "durability": durability, "log_slots": log_slots, "push": push,
        }  # fmt: skip
        spec.update({name: value for name, value in stated.items() if value is not None})
        session = cls._open(
            url, id or uuid.uuid4().hex, proxy, ca_certs, api_key, worker, policy, seed, compress
        )
        try:
            found = session._document("PUT", path_of(session.id), spec, ("dtype",))
            session._standing.describe(found)
            session.attached = bool(found.get("attached"))
            if params is not None:
                session._initialise(params)
            session._join(join)
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
        join: bool | None = None,
        policy: RetryPolicy | None = None,
        seed: int | None = None,
        proxy: str | None = None,
        ca_certs: str | None = None,
        compress: Compress = None,
    ) -> "Session":
        """Goes to a session that exists, whatever it was created with.

        The arguments are those of `create`.

        Raises:
            SessionUnknown: There is none of this id.
        """
        session = cls._open(url, id, proxy, ca_certs, api_key, worker, policy, seed, compress)
        try:
            session.info()
            session._join(join)
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

    @property
    def compress(self) -> Codec | ErrorFeedback | None:
        """What makes gradients smaller before they are sent; None: nothing does.

        The state of an `ErrorFeedback` belongs into the trainer's own checkpoints.
        """
        return self._pushes.compress

    def _join(self, wanted: bool | None) -> None:
        if wanted or (wanted is None and self._standing.waits):
            self.join()

    # Training

    @property
    def version(self) -> Version | None:
        """(epoch, version) that gradients count as computed from; None before the first.

        That of the parameters pulled last, or that this object's last upload resulted in.
        """
        return self._standing.version

    @version.setter
    def version(self, version: Version | None) -> None:
        self._standing.version = version

    @overload
    def push(
        self,
        grads: Tensors,
        *,
        loss: float | None = None,
        base_version: Version | None = None,
        overrides: Overrides | None = None,
        grad_scale: float | None = None,
        weight: float | None = None,
        wait: Literal[True] = True,
        deadline_s: float | None = None,
    ) -> Summary: ...

    @overload
    def push(
        self,
        grads: Tensors,
        *,
        loss: float | None = None,
        base_version: Version | None = None,
        overrides: Overrides | None = None,
        grad_scale: float | None = None,
        weight: float | None = None,
        wait: Literal[False],
        deadline_s: float | None = None,
    ) -> Contribution: ...

    def push(
        self,
        grads: Tensors,
        *,
        loss: float | None = None,
        base_version: Version | None = None,
        overrides: Overrides | None = None,
        grad_scale: float | None = None,
        weight: float | None = None,
        wait: bool = True,
        deadline_s: float | None = None,
    ) -> Summary | Contribution:
        """Posts a gradient; returns when it was applied, exactly once.

        In sync mode that is when its round is closed, and in bounded mode when the slowest worker
        is near enough. A pending push is settled first, in the same deadline. If that is refused or
        fails, its error is raised, with a note, and this gradient was not sent.

        Args:
            grads: Name → array, every tensor of the session, in any order; `Rows` for one of
                which only some rows have a gradient.
            loss: For the history; left out there if it is not finite.
            base_version: Of the parameters the gradient was computed from; those pulled last where
                None.
            overrides: Hyperparameters of this update, as {"default": {"lr": 0.1}}, by group. All
                contributions to a round have the same.
            grad_scale: The gradient is divided by it.
            weight: Of sync mode, in the mean of the round; 1 where None. With 0 it is a pass, as
                by `skip_round`: the gradient is not sent.
            wait: False: do not wait for other workers. What was received is a `Contribution`, and
                `wait` tells what became of it.
            deadline_s: Seconds for this call; as the policy says where None. A round may last as
                long as its timeout, so give it more than that.

        Raises:
            NotPulled: Nothing was pulled or uploaded yet, and `base_version` is not given.
            MovedOn: The model moved on, so pull and compute again: `StaleGradient`, it did so too
                far; `EpochChanged`, its history was cut; `RoundClosed`, others have closed the
                round; `RoundAbandoned`, nobody's gradient was applied.
            AlreadyContributed: To this round, by another push.
            RefusedError: Anything else the server refuses.
            DeadlineExceeded: No answer in time; the push is pending (`kept` is its sequence), so
                do not push this gradient again. If `kept` is None it was not sent.
        """
        terms = Terms(loss, base_version, overrides, grad_scale, weight)
        end = self._retrier.end(deadline_s)
        if wait:
            return self._pushes.send(grads, terms, PLAIN, end)
        return self._pushes.post(grads, terms, end)

    def push_pull(
        self,
        grads: Tensors,
        *,
        loss: float | None = None,
        base_version: Version | None = None,
        overrides: Overrides | None = None,
        grad_scale: float | None = None,
        weight: float | None = None,
        into: Buffer | None = None,
        dtype: str | None = None,
        deadline_s: float | None = None,
    ) -> tuple[Summary, Params]:
        """Posts a gradient and gets the parameters after it, in one request where it can be.

        As `push`, a pending one included: `settle` then returns its summary, and `pull` the
        parameters.

        Args:
            grads: As for `push`.
            loss: For the history.
            base_version: As for `push`.
            overrides: As for `push`.
            grad_scale: As for `push`.
            weight: As for `push`.
            into: Memory to use again; arrays returned earlier with it are overwritten.
            dtype: Of the answer: F32, F64, F16, BF16 (as uint16), or model.
            deadline_s: As for `push`.

        Raises:
            GradpostError: As `push`. Where `summary` is set the gradient was applied, and only the
                parameters did not come: pull them.
        """
        form: Reading[tuple[Summary, Params | None]] = Reading(
            lambda answer: self._answered(answer, into, (dtype, None)),
            lambda summary: (summary, None),
            {"Accept": SAFETENSORS},
            "" if dtype is None else "&" + urlencode({"dtype": dtype}),
        )
        terms = Terms(loss, base_version, overrides, grad_scale, weight)
        end = self._retrier.end(deadline_s)
        summary, received = self._pushes.send(grads, terms, form, end)
        if received is not None:
            return summary, received
        try:  # it was applied, after a wait, or its parameters can't be had so: pull says why
            return summary, self._pull_after(summary, into, dtype)
        except GradpostError as error:
            error.of_applied(summary)
            raise

    def skip_round(
        self,
        *,
        base_version: Version | None = None,
        overrides: Overrides | None = None,
        deadline_s: float | None = None,
    ) -> Summary:
        """Takes part in a round of sync mode without a gradient, so that nobody waits for one.

        Args:
            base_version: As for `push`.
            overrides: Those of the other pushes: all to a round have the same, passes too.
            deadline_s: As for `push`.

        Returns:
            What the others' gradients did.

        Raises:
            GradpostError: As `push`.
        """
        terms = Terms(None, base_version, overrides, None, 0.0)
        return self._pushes.send({}, terms, PLAIN, self._retrier.end(deadline_s))

    def wait(self, contribution: Contribution, deadline_s: float | None = None) -> Summary:
        """Waits until the round of a contribution is closed.

        Args:
            contribution: As `push(wait=False)` returned it.
            deadline_s: Seconds for this call; as the policy says where None.

        Raises:
            RoundAbandoned: It was, and the contribution with it.
            RoundUnknown: The round was closed so long ago that the server has forgotten it, or
                the session has come back from before it.
            DeadlineExceeded: It is still open; wait again.
        """
        self._check_open()
        return self._pushes.rounds.wait(contribution, self._retrier.end(deadline_s))

    def train_step(
        self,
        compute: Compute,
        *,
        on_refused: str = "recompute",
        attempts: int = 5,
        weight: float | None = None,
        overrides: Overrides | None = None,
        into: Buffer | None = None,
        dtype: str | None = None,
        deadline_s: float | None = None,
    ) -> Summary:
        """Pulls, computes a gradient and pushes it; once more where the model moved on meanwhile.

        Args:
            compute: Parameters → gradients, or (loss, gradients). It may be called several times.
            on_refused: "recompute", or "raise" at the first refusal.
            attempts: Gradients to compute at most.
            weight: As for `push`.
            overrides: As for `push`.
            into: As for `pull`.
            dtype: As for `pull`.
            deadline_s: As for `push`, of each attempt.

        Raises:
            MovedOn: The model moved on during the last attempt too.
            GradpostError: As `pull` and `push`.
        """

        def push(grads: Tensors, loss: float | None) -> Summary:
            return self.push(
                grads, loss=loss, weight=weight, overrides=overrides, deadline_s=deadline_s
            )

        return train_step(
            lambda: self.pull(into=into, dtype=dtype),
            push,
            compute,
            on_refused=on_refused,
            attempts=attempts,
        )

    @property
    def pending(self) -> int | None:
        """Sequence of the oldest push that may have been applied and that no answer settled.

        None if there is none. Several threads may leave several: `settle` takes them one by one.
        """
        return self._pushes.pending

    def settle(self, deadline_s: float | None = None) -> Summary | None:
        """Sends the oldest pending push again, the same bytes, until an answer settles it.

        In sync mode that is when its round is closed.

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
        return self._pushes.settle(self._retrier.end(deadline_s))

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
        query += [("worker", self.worker)] if self._membership.joined else []  # renews the lease
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
            self._standing.pulled(said)
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

    def step_async(self, grads: Tensors, **options: Any) -> "Future[tuple[Summary, Params]]":
        """`push_pull_async` by another name: what it did, and the parameters to go on with."""
        return self.push_pull_async(grads, **options)

    # Everything else

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
        body = encode(params, self._standing.master)

        def read(answer: Answer) -> tuple[int, dict[str, Any]]:
            return answer.status, members(answer, ("epoch", "version", "dtype"))

        status, found = self._run(
            lambda timeout: self._calls.send("POST", path, read, timeout, headers=BINARY, body=body)
        )
        now = int(found["epoch"]), int(found["version"])
        with self._standing.lock:  # nobody pushed in between: the others are those pulled last
            if status == 201 and self.version == (now[0], now[1] - 1):
                self._standing.version = now
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
        self._replace("params", encode(params, self._standing.master), first_only=first_only)

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
        self._replace("state", encode(state.tensors, self._standing.master, facts))

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

    def _pull_after(self, summary: Summary, into: Buffer | None, dtype: str | None) -> Params:
        """The parameters after a push, or newer ones."""
        try:
            return self.pull(into=into, dtype=dtype, min_version=summary.at)
        except EpochChanged:  # by an upload since: what is there now came after all the same
            return self.pull(into=into, dtype=dtype)

    def _answered(
        self, answer: Answer, into: Buffer | None, form: Form
    ) -> tuple[Summary, Params | None]:
        """The summary of a push, and the parameters if the server sent them."""
        if (answer.headers.get("Content-Type") or "").startswith(JSON):
            return summary_of(answer), None
        received, said = tensors_of(answer, into, form)
        summary = Summary.of(json.loads(said[SUMMARY]))
        self._standing.pulled(said)
        return summary, received.tensors


def _shape(value: Any) -> tuple[int, ...]:
    return np.asarray(getattr(value, "bits", value)).shape
