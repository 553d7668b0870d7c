"""What a push did."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
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
        grad_norm: Of the whole gradient before clipping; None if it was not finite.
        clipped: True if clipping made it smaller.
        skipped: "nonfinite", "passes" (a round in which nobody sent a gradient), or None.
        params_finite: False if a parameter became infinite or NaN.
        update_norm: Of the change of all parameters; None unless the session measures norms.
        param_norm: Of all parameters after it; None unless the session measures norms.
        round: Of synchronous sessions, the number of the round; None for others.
        contributions: Gradients that the round had, passes not counted.
        ahead: Of bounded sessions, whether the wait for slower workers was cut short.
        wire: The lossy form in which the gradient came, such as "int8"; None for plain numbers.
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
    clipped: bool
    skipped: str | None
    params_finite: bool
    update_norm: float | None
    param_norm: float | None
    round: int | None = None
    contributions: int | None = None
    ahead: bool | None = None
    wire: str | None = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Summary":
        """Reads the JSON members; what this version does not know is left out.

        Those with a default may be absent, as an older server leaves them out.

        Raises:
            KeyError: Another member is absent.
        """
        return cls(
            **{
                field.name: document[field.name]
                for field in fields(cls)
                if field.default is MISSING or field.name in document
            }
        )

    @property
    def at(self) -> tuple[int, int]:
        """(epoch, version) of the parameters after it."""
        return self.epoch, self.version
