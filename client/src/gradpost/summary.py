"""What a push did."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Summary:
    """The server's answer to a push.

    Attributes:
        step: Completed updates of the session.
        epoch: Grows when the session's history is cut.
        version: Of the parameters, within the epoch.
        applied: False if the gradient was skipped.
        replayed: True if this repeats an earlier answer: nothing was applied now.
        identified: True if the push may be retried freely.
        staleness: Versions between the gradient's base and the parameters it was applied to.
        lr: The learning rate of this update.
        grad_norm: Of the whole gradient; None if it was not finite.
        skipped: "nonfinite", or None.
        params_finite: False if a parameter became infinite or NaN.
    """

    step: int
    epoch: int
    version: int
    applied: bool
    replayed: bool
    identified: bool
    staleness: int
    lr: float
    grad_norm: float | None
    skipped: str | None
    params_finite: bool

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Summary":
        """Reads the JSON members; what this version does not know is left out."""
        return cls(**{field.name: document[field.name] for field in fields(cls)})
