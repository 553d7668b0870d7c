"""`RemoteOptimizer`: a `torch.optim.Optimizer` whose step runs on a server."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from gradpost.answers import Params
from gradpost.errors import EpochChanged, MovedOn
from gradpost.retry import RetryPolicy
from gradpost.session import Session
from gradpost.summary import Summary
from gradpost.torch import names, rules, tensors
from gradpost.torch.groups import Groups, Held, ParamGroups
from gradpost.torch.link import Link, arrays
from gradpost.torch.pending import Pending
from gradpost.torch.state import by_param, from_torch, same, to_torch
from gradpost.transport import Transport

REMOTE = "gradpost_checkpoint"
"""Where a state dict refers to a checkpoint on the server."""


class RemoteOptimizer(torch.optim.Optimizer):
    """A drop-in for torch's optimizers that keeps state and parameters on a gradpost server.

    `step` sends the gradients and writes the server's new parameters into the model. Formulas and
    defaults are torch's. `param_groups` are the truth: what is edited there, by hand or by a
    scheduler, holds from the next step on. `state` is empty, for the state is on the server;
    `state_dict` fetches it and `load_state_dict` uploads it, both in torch's structure. Buffers
    of modules are not synchronised. Not for several threads, as little as torch's.

    Attributes:
        session: The session on the server: `pull(of="ema")`, `history()`, `delete()`, ….
        dropped: Gradients that were refused because the model had moved on.
        summary: What the last push did; None before the first.

    Args:
        params: A module, its (named) parameters, or dicts of groups. A group may also have a
            `name` for the server, and a `rule` of its own.
        url: Where the server is, as `Session.create` takes it.
        id: Of the session; a random one where None. Processes that give the same one share it:
            the first one's parameters are taken, and the others start from them.
        rule: The server's name of the update rule, such as "adam".
        dtype: Of parameters and state on the server, F32 or F64; None: F64 if any parameter of
            the model is float64.
        update: As {"max_staleness": 8}, or {"mode": "sync", "workers": 4, "round_timeout_s": 60}:
            then a step waits for the others', which its `policy` has to leave time for, and one
            without gradients passes the round.
        on_nonfinite: "refuse" (default): a gradient with NaN or infinity raises; or "skip".
        clip: As {"global_norm": 1.0}, done by the server.
        schedule: Of the learning rate, by the server; for a rate that param_groups leave as it was.
        ema: As {"decay": 0.999}.
        norms: Measure update_norm and param_norm too.
        durability: none, snapshot or log: what a crash of the server leaves.
        on_refused: "drop": a gradient for a model that has moved on is dropped, the new parameters
            are pulled, and the first time there is a warning; "raise": the refusal is raised.
        unscale: Who divides gradients that a GradScaler has multiplied: the "server" (default), in
            its own precision; or the "scaler", in place and before the push, as with torch's
            optimizers that are not fused. Lightning clips under mixed precision only then.
        api_key, worker, policy, seed, proxy, ca_certs: As for `Session.create`.
        hyper: Hyperparameters by torch's names.

    Raises:
        ValueError: As the rule's torch optimizer, or parameters that no session can hold.
        RefusedError: The server refuses the session.
    """

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    state: defaultdict[torch.Tensor, Any]

    def __init__(
        self,
        params: Any,
        url: str | Transport,
        id: str | None = None,
        *,
        rule: str,
        dtype: str | None = None,
        update: Mapping[str, Any] | None = None,
        on_nonfinite: str | None = None,
        clip: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        ema: Mapping[str, Any] | None = None,
        norms: bool | None = None,
        durability: str | None = None,
        on_refused: str = "drop",
        unscale: str = "server",
        api_key: str | None = None,
        worker: str | None = None,
        policy: RetryPolicy | None = None,
        seed: int | None = None,
        proxy: str | None = None,
        ca_certs: str | None = None,
        **hyper: Any,
    ) -> None:
        if on_refused not in ("drop", "raise"):
            raise ValueError(f"on_refused is drop or raise, not {on_refused!r}.")
        if unscale not in ("server", "scaler"):
            raise ValueError(f"unscale is server or scaler, not {unscale!r}.")
        self.dropped = 0
        self.summary: Summary | None = None
        self._on_refused = on_refused
        # If true, GradScaler leaves grad_scale and found_inf to `step`. Not of the class: wrappers
        # that inherit from it, such as Lightning's, would not look at the instance.
        self._step_supports_amp_scaling = unscale == "server"
        self._scheduled = schedule is not None
        self._pending: Pending | None = None
        self._groups = Groups(rule)
        self._made = False
        super().__init__(names.listed(params), rules.defaults(rule, hyper))
        for index, group in enumerate(self.param_groups):
            known = self._defaults_of(group)
            self._groups.entries += self._groups.take_in(self.param_groups, index, known)
        if not self._groups.entries:
            raise ValueError("No parameter requires a gradient; there is nothing to train.")
        self._master = dtype or tensors.master_of(self._groups.entries)
        self.session = Session.create(
            url, id, params=arrays(self._groups.entries), dtype=self._master,
            optimizer=self._groups.stated[0], groups=self._groups.spec() or None, update=update,
            on_nonfinite=on_nonfinite, clip=clip, schedule=schedule, ema=ema,
            norms=norms, missing="skip", durability=durability, api_key=api_key, worker=worker,
            policy=policy, seed=seed, proxy=proxy, ca_certs=ca_certs,
        )  # fmt: skip
        self._link = Link(self.session, self._groups, self._master)
        try:
            self._link.describe()
            self._link.pull()  # those of whoever was first
        except BaseException:
            self.session.close()
            raise
        for held in self._groups.held:
            self._fill(held)
        self._made = True

    # Training

    def step(  # type: ignore[override, unused-ignore]  # torch's own has two overloads
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Any = None,
        weight: float | None = None,
        blocking: bool = True,
    ) -> Any:
        """Sends the gradients and writes the new parameters into the model.

        Parameters without a gradient stay as they are, state and all.

        Args:
            closure: Computes the loss and the gradients anew; what it returns is reported.
            loss: Reported for the session's history, where there is no closure.
            weight: Of sync mode: that of the gradient in the mean of its round; 1 where None.
            blocking: False: return at once. The parameters change in `synchronize`, or at the
                beginning of the next step, over whatever the model holds then. The gradients are
                copied, so backward may go on.

        Returns:
            The loss; a `Pending` if not blocking.

        Raises:
            RefusedError: The server refuses, but see `on_refused`.
            RuntimeError: A gradient is sparse.
        """
        if closure is not None:
            self.synchronize()  # the closure computes with the parameters that the model has
            with torch.enable_grad():
                loss = closure()
        base = self._link.mirror.at
        self.synchronize()
        infinite, scale = self._amp()
        grads: dict[str, Any] = {}
        if not infinite:
            base = self._link.settle(base)
            grads = tensors.gradients(self._groups.entries, self._master, copy=not blocking)
        if not grads:
            if self.session.mode != "sync":
                return loss if blocking else Pending(None, loss)
            weight, scale = 0.0, None  # a pass: the others wait for a word of this process
        options: dict[str, Any] = {
            "loss": _finite(loss),
            "base_version": base,
            "overrides": self._groups.overrides(self.param_groups),
            "grad_scale": scale,
            "weight": weight,
            "into": self._link.mirror.buffer,
            "dtype": self._link.dtype,
        }
        if not blocking:
            self._pending = Pending(self.session.push_pull_async(grads, **options), loss)
            return self._pending
        self._finish(lambda: self.session.push_pull(grads, **options))
        return loss

    def synchronize(self) -> None:
        """Waits for the step under way, if there is one, and writes its parameters.

        Raises:
            GradpostError: What became of that step.
        """
        pending, self._pending = self._pending, None
        if pending is not None and pending.future is not None:
            self._finish(pending.future.result)

    def pull(self) -> None:
        """Writes the server's newest parameters into the model, over whatever is there."""
        self.synchronize()
        self._link.pull()

    def upload(self) -> None:
        """Sends the model's parameters to the server; the optimizer's state stays.

        `step` does so by itself after in-place changes that torch counts, such as those of
        `load_state_dict` of a module; those through `.data` it does not see. A new epoch begins.
        """
        self.synchronize()
        self._link.upload(self._groups.entries)

    def close(self) -> None:
        """Finishes the step under way and closes the connections; the session stays."""
        try:
            self.synchronize()
        finally:
            self.session.close()

    def __enter__(self) -> "RemoteOptimizer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # what went wrong matters more than what becomes of the last step
            self.session.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "A RemoteOptimizer owns a connection and a place among a session's workers: it can be "
            "neither copied nor pickled. Save its state_dict(), or make another one with the same "
            "session id."
        )

    def _finish(self, answer: Callable[[], tuple[Summary, Params]]) -> None:
        """Takes the answer to a push, or drops the gradient that was refused."""
        try:
            self.summary, received = answer()
        except MovedOn as error:
            self._drop(error)
        else:
            self._link.mirror.write(self._groups.entries, received)

    def _drop(self, error: MovedOn) -> None:
        if self._on_refused == "raise":
            raise error
        if isinstance(error, EpochChanged):  # perhaps the session was created anew
            self._link.describe()
        self._link.pull()
        self.dropped += 1
        if self.dropped == 1:
            warnings.warn(
                f"The server dropped a gradient, for the model had moved on ({error.detail}) The "
                "new parameters were pulled. Further ones are only counted, in `dropped`.",
                RuntimeWarning,
                stacklevel=5,  # where the training loop calls step
            )

    def _amp(self) -> tuple[bool, float | None]:
        """Whether GradScaler found infinities, and what it has multiplied the gradients by."""
        found = getattr(self, "found_inf", None)
        scale = getattr(self, "grad_scale", None)
        return bool(found), None if scale is None else float(scale)

    def _fill(self, held: Held) -> None:
        """Shows the defaults of a rule that torch has not, which are the server's."""
        group = self.param_groups[held.group]
        if self._groups.rule_of(group) not in rules.TORCH:
            rules.complete(group, held.hyper)
            if "rule" not in group:
                rules.complete(self.defaults, held.hyper)

    def _defaults_of(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        return rules.group_defaults(group) if "rule" in group else self.defaults

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch does; on the server too, once the optimizer is made.

        Args:
            param_group: As for torch; may have `name` and `rule`.

        Raises:
            RefusedError: The server refuses it; then nothing was added.
        """
        defaults = self.defaults
        if isinstance(param_group, dict) and "rule" in param_group:
            self.defaults = rules.group_defaults(param_group)
        try:
            super().add_param_group(param_group)
        finally:
            self.defaults = defaults
        if not self._made:
            return
        index = len(self.param_groups) - 1
        try:
            self.synchronize()
            known = self._defaults_of(param_group)
            entries = self._groups.take_in(self.param_groups, index, known)
            if entries:
                self._link.settle(self._link.mirror.at)
                self._fill(self._link.create(self._groups.another_name(index), entries))
        except BaseException:
            del self.param_groups[index:]
            self._groups.forget(index)
            raise
        if entries:
            self._link.pull()  # another worker may have added it before

    # Checkpoints

    def state_dict(  # type: ignore[override, unused-ignore]  # torch's takes no arguments
        self, *, remote: bool = False, name: str | None = None
    ) -> dict[str, Any]:
        """The state in torch's structure, fetched from the server; its tensors are on the CPU.

        torch's optimizer of this rule loads it, and `load_state_dict` does. With `ema` there is an
        `ema` beside the arrays of each parameter.

        Args:
            remote: Make a checkpoint on the server instead, parameters included, and return its
                reference: only a `load_state_dict` on this session takes it.
            name: Of that checkpoint; None for one that tells step and version.
        """
        self.synchronize()
        if remote:
            made = self.session.checkpoints.make(name)
            groups: dict[str, Any] = super().state_dict()
            return {**groups, REMOTE: {"session": self.session.id, "checkpoint": made.name}}
        each = self._groups.rules(self.param_groups)
        now = self.session.state()
        found = to_torch(now, self._groups.entries, each, steps=self._scheduled)
        self.state = defaultdict(dict, found)
        try:
            packed: dict[str, Any] = super().state_dict()
        finally:
            self.state = defaultdict(dict)
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the groups and sends state and parameters to the server, each if it differs.

        In a shared session that is for all its workers: a new epoch begins. What the server has
        already is not sent, and begins none.

        Args:
            state_dict: Of this optimizer, or of torch's optimizer of this rule. One that
                `state_dict(remote=True)` made restores the checkpoint that it names, parameters
                included.

        Raises:
            ValueError: It does not fit; then nothing was changed.
        """
        self.synchronize()
        reference = state_dict.get(REMOTE)
        if reference is not None and reference["session"] != self.session.id:
            raise ValueError(
                f"The checkpoint is one of session {reference['session']!r}, and this is "
                f"{self.session.id!r}; download it there and restore the file here."
            )
        before, taken = self.param_groups, {}

        def take(_: object, found: dict[str, Any]) -> dict[str, Any]:
            taken.update(found)
            return {**found, "state": {}}  # torch would round it to the parameters' dtype

        handle = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
        try:
            self._restore(before, taken)
        except BaseException:
            self.param_groups = before
            raise

    def _restore(self, before: ParamGroups, saved: Mapping[str, Any]) -> None:
        """Sends a loaded state to the server, and gives the groups what a saved one may lack."""
        for group, old in zip(self.param_groups, before, strict=True):
            if "rule" in old:
                group.setdefault("rule", old["rule"])
            group.update(rules.IMPLIED.get(self._groups.rule_of(group), {}))
            for name, value in self._defaults_of(group).items():
                group.setdefault(name, value)
        own = by_param(self.param_groups, saved)
        each, hyper = self._groups.rules(self.param_groups), self._groups.hyper()
        reference = saved.get(REMOTE)
        if reference is not None:
            self.session.checkpoints.restore(reference["checkpoint"])
            self._link.settle(self._link.mirror.at, closely=True)
            self._link.pull()
            return
        now = self.session.state()
        wanted = from_torch(now, own, self._groups.entries, each, hyper, self._master)
        if not same(wanted, now):  # accelerate loads what it has fetched a moment before
            self.session.set_state(wanted)
        self._link.settle(self._link.mirror.at, closely=True)
        self._link.pull()


def _finite(loss: Any) -> float | None:
    """The loss as a number, if it is one and the history takes it."""
    if isinstance(loss, torch.Tensor):
        loss = loss.item() if loss.numel() == 1 else None
    return float(loss) if loss is not None and math.isfinite(loss) else None
