"""`LocalSteps`: DiLoCo and FedAvg around a torch optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from gradpost.answers import Params
from gradpost.outer import OuterLoop, check, opened
from gradpost.protocol.dtypes import NUMPY
from gradpost.session import Session
from gradpost.tensors import Tensors
from gradpost.torch import names, tensors
from gradpost.torch.link import arrays
from gradpost.torch.names import FLOATS, Entry
from gradpost.transport import Transport


class LocalSteps(OuterLoop):
    """Steps of a torch optimizer, and a push of what they changed after each `every` of them.

    `gradpost.outer.OuterLoop` says what is pushed, what happens on a refusal, and the attributes.
    With the outer rule sgd, lr 0.7, momentum 0.9 and nesterov it is DiLoCo, with sgd and lr 1
    FedAvg, with adam and bias_correction=False FedAdam.

    Only parameters that require gradients when this is made are moved. Buffers (the running means
    of a BatchNorm) stay each trainer's own, and so does the state of the inner optimizer.

    Attributes:
        model: Whose parameters they are.
        inner: The optimizer of the local steps.

    Args:
        model: A module.
        inner: Its optimizer, as if there were no server; schedulers hold on to this one.
        outer: Where the server is, or a session that was created with push="delta".
        id: Of the session; a random one where None. Trainers that give the same one share it:
            the first one's parameters are taken, and the others start from them.
        every: Local steps between two pushes.
        weight: Of the deltas in a round of sync mode, such as the number of examples seen.
        on_refused: "drop", or "raise": the refusal is raised.
        deadline_s: Seconds for a push; as the session's policy says where None.
        options: As for `gradpost.Session.create`: rule, lr, momentum, update, worker, ….

    Raises:
        ValueError: As `OuterLoop`, parameters that no session can hold, or it holds another model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inner: torch.optim.Optimizer,
        outer: Session | str | Transport,
        id: str | None = None,
        *,
        every: int,
        weight: float | None = None,
        on_refused: str = "drop",
        deadline_s: float | None = None,
        **options: Any,
    ) -> None:
        check(every, on_refused)
        self.model = model
        self.inner = inner
        self._entries = [
            Entry(param, name, 0) for name, param in model.named_parameters() if param.requires_grad
        ]
        if not self._entries:
            raise ValueError("No parameter requires a gradient; there is nothing to train.")
        for entry in self._entries:
            names.check(entry.param, entry.name)
        if not isinstance(outer, Session):
            options.setdefault("dtype", tensors.master_of(self._entries))
        self._mirror = tensors.Mirror()
        session, owned = opened(outer, id, arrays(self._entries), options)
        try:
            super().__init__(
                session, owned=owned, every=every, weight=weight, on_refused=on_refused,
                deadline_s=deadline_s,
            )  # fmt: skip
            self._buffer = self._mirror.buffer
            self.pull()  # those of whoever was first
        except BaseException:
            if owned:
                session.close()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the inner optimizer; the last of `every` synchronises.

        Args:
            closure: As for the inner optimizer.

        Returns:
            What the inner optimizer returns: the loss, with a closure.

        Raises:
            GradpostError: As `sync`.
        """
        loss = self.inner.step() if closure is None else self.inner.step(closure)
        self.count()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """That of the inner optimizer."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, where the local steps began, and how many there were.

        Save it with the model's own. The outer optimizer's state is the session's:
        `session.checkpoints`.
        """
        state = super().state_dict()
        start = {name: torch.from_numpy(value) for name, value in state["start"].items()}
        return {**state, "start": start, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a `state_dict` was made; load the model's after this was made, too.

        If the server's model has moved on too far since, the next delta is dropped, as ever.

        Raises:
            ValueError: It is of another model.
        """
        start = {name: value.numpy(force=True) for name, value in state["start"].items()}
        super().load_state_dict({**state, "start": start})
        self.inner.load_state_dict(state["inner"])

    @property
    def _dtype(self) -> str | None:
        return tensors.wanted(self._entries, self.session.dtype)

    def _changes(self) -> Tensors:
        for param, name, _ in self._entries:
            start = self._start[name]
            end = param.detach().to(torch.from_numpy(start).dtype).numpy(force=True)
            np.subtract(end, start, out=start)
        return self._start

    def _begin(self, params: Params) -> Params:
        self._mirror.write(self._entries, params)
        return {
            param_name: _start(param, params[param_name]) for param, param_name, _ in self._entries
        }


def _start(param: torch.Tensor, outer: Any) -> Any:
    """What local steps begin from: the received values, or of a half parameter its own.

    Of that the rounding is no change that its steps made, and a difference of halves is rounded.
    """
    if outer.dtype == NUMPY[FLOATS[param.dtype]] and outer.dtype.itemsize >= 4:
        return outer
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    return param.detach().to(wide, copy=True).numpy(force=True)
