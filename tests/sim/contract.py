"""What is agreed with a session: specifications, messages, answers, as the model has them."""

from typing import Any, NamedTuple


class Update(NamedTuple):
    """The `update` of a specification; what belongs to another mode is not looked at."""

    mode: str = "async"
    max_staleness: int | None = None
    on_stale: str = "refuse"
    workers: int = 1
    quorum: int | None = None
    min_contributions: int = 1
    on_lost: str = "shrink"
    round_timeout_s: float = 4.0
    reduce: str = "mean"
    trim: float | None = None
    order: str = "arrival"
    max_norm: float | None = None
    on_max_norm: str = "refuse"
    slack: int = 0
    lease_s: float = 120.0

    @property
    def needed(self):
        return self.workers if self.quorum is None else self.quorum


class Spec(NamedTuple):
    """What a session is created with. Of adam the model knows all but the parameters."""

    update: Update = Update()
    rule: str = "sgd"
    lr: float = 0.125
    clip: float | None = None
    dtype: str = "F32"
    on_nonfinite: str = "refuse"
    push: str = "gradient"
    missing: str = "refuse"
    durability: str = "none"


class At(NamedTuple):
    epoch: int
    version: int
    step: int


class Message(NamedTuple):
    """A push as it travels. `values` is None for a pass, else exact in `dtype`."""

    worker: str | None
    sequence: int | None
    base: tuple[int, int] | None
    values: Any
    dtype: str = "F32"
    weight: float = 1.0
    scale: float | None = None
    loss: float | None = None
    lr: float | None = None
    """An override of lr."""
    present: tuple[bool, ...] | None = None
    """Of each tensor, whether it came; None: all. The values of the others are 0."""

    @property
    def mark(self):
        """What makes it the same push in every encoding."""
        body = None if self.values is None else self.values.tobytes()
        return body, self.base, self.weight, self.scale, self.loss, self.lr, self.present


class Reply(NamedTuple):
    """An answer: a refusal, a summary, or a round that is open (no reason) or was abandoned."""

    slug: str | None = None
    replayed: bool = False
    summary: dict[str, Any] | None = None
    round: int | None = None
    reason: str | None = None
    context: dict[str, Any] = {}  # noqa: RUF012 - never changed
