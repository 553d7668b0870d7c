"""`LocalSteps`: DiLoCo and FedAvg for a model of NumPy arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpost.answers import Params
from gradpost.outer import OuterLoop, check, opened
from gradpost.session import Session
from gradpost.summary import Summary
from gradpost.tensors import Tensors
from gradpost.transport import Transport


class LocalSteps(OuterLoop):
    """Local steps on arrays, and a push of what they changed after each `every` of them.

    `OuterLoop` says what is pushed, what happens on a refusal, and the attributes. The delta is
    computed in place in float32 (float64 in an F64 session), over the copy of the parameters that
    is received: one more model of memory, and the arrays themselves are only written by a pull.

    ```python
    local = gradpost.LocalSteps(url, params, "run", every=50, rule="sgd", lr=0.7, momentum=0.9,
                                nesterov=True)
    for batch in batches:
        for name, grad in gradients(params, batch).items():
            params[name] -= 0.01 * grad
        local.step()
    ```

    Args:
        outer: Where the server is, or a session that was created with push="delta".
        params: Name → array, the trainable parameters, changed in place by both. Those of whoever
            made the session are written into them.
        id: Of the session; a random one where None. Trainers that give the same one share it.
        every: Local steps between two pushes.
        weight: Of the deltas in a round of sync mode, such as the number of examples seen.
        on_refused: "drop", or "raise": the refusal is raised.
        deadline_s: Seconds for a push; as the session's policy says where None.
        options: As for `Session.create`: rule, lr, momentum, update, worker, ….

    Raises:
        TypeError: An array that can't be written.
        ValueError: As `OuterLoop`, or the session holds another model.
    """

    def __init__(
        self,
        outer: Session | str | Transport,
        params: Mapping[str, NDArray[Any]],
        id: str | None = None,
        *,
        every: int,
        weight: float | None = None,
        on_refused: str = "drop",
        deadline_s: float | None = None,
        **options: Any,
    ) -> None:
        check(every, on_refused)
        for name, array in params.items():
            if not isinstance(array, np.ndarray) or not array.flags.writeable:
                raise TypeError(f"{name!r} is no NumPy array that can be written in place.")
        self.params = params
        session, owned = opened(outer, id, params, options)
        try:
            super().__init__(
                session, owned=owned, every=every, weight=weight, on_refused=on_refused,
                deadline_s=deadline_s,
            )  # fmt: skip
            self.pull()  # those of whoever was first
        except BaseException:
            if owned:
                session.close()
            raise

    def step(self) -> Summary | None:
        """Counts a local step that was made, and synchronises when it is the last of `every`.

        Returns:
            What the push did; None if there was none, or its delta was dropped.

        Raises:
            GradpostError: As `sync`.
        """
        return self.count()

    def _changes(self) -> Tensors:
        for name, start in self._start.items():
            np.subtract(self.params[name], start, out=start, casting="same_kind")
        return self._start

    def _begin(self, params: Params) -> Params:
        for name, array in self.params.items():
            shape = params[name].shape if name in params else "no such tensor"
            if shape != array.shape:
                raise ValueError(
                    f"The session holds another model: for {name!r} of shape {array.shape} it has "
                    f"{shape}."
                )
        start = {}
        for name, array in self.params.items():
            outer = params[name]
            array[...] = outer
            # Of a narrower array the rounding is no change that its steps made.
            start[name] = outer if array.dtype == outer.dtype else array.astype(outer.dtype)
        return start
