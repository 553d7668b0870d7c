"""One step of training that goes on where the model is."""

from collections.abc import Callable
from typing import Any

from gradpost.answers import Params
from gradpost.errors import MovedOn
from gradpost.summary import Summary
from gradpost.tensors import Tensors

Compute = Callable[[Params], Tensors | tuple[Any, Tensors]]
"""Parameters → gradients, or (loss, gradients)."""


def train_step(
    pull: Callable[[], Params],
    push: Callable[[Tensors, float | None], Summary],
    compute: Compute,
    *,
    on_refused: str,
    attempts: int,
) -> Summary:
    """Pulls, computes and pushes; again, from the new parameters, where the model moved on.

    Args:
        pull: Gets the newest parameters.
        push: Sends a gradient and its loss.
        compute: As `Session.train_step` takes it.
        on_refused: "recompute", or "raise".
        attempts: Gradients to compute at most.

    Raises:
        MovedOn: The model moved on during the last attempt too.
    """
    if on_refused not in ("recompute", "raise"):
        raise ValueError(f"on_refused is recompute or raise, not {on_refused!r}.")
    if attempts < 1:
        raise ValueError(f"attempts is 1 or more, not {attempts!r}.")
    left = attempts if on_refused == "recompute" else 1
    while True:
        left -= 1
        found = compute(pull())
        loss, grads = found if isinstance(found, tuple) else (None, found)
        try:
            return push(grads, None if loss is None else float(loss))
        except MovedOn:
            if not left:
                raise
