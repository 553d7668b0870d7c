"""When pushes become updates: each on arrival, in rounds, or within a bound (DESIGN §5)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from pydantic import Field

from service.hyper import Strict
from service.schemas.refusals import invalid

ROBUST = ("trimmed_mean", "median")
"""Reductions that look at every contribution at once."""
WEEK_S = 604_800.0


class Update(Strict):
    """When a pushed gradient is applied, and together with which others."""

    mode: Literal["async", "sync", "bounded"] = Field(
        "async",
        description="async: on arrival; sync: in rounds; bounded: on arrival, and whoever is too "
        "far ahead waits for its answer.",
    )
    max_staleness: int | None = Field(
        None,
        ge=0,
        lt=1 << 63,
        description="async: versions a gradient may be behind; null: any number.",
    )
    on_stale: Literal["refuse", "scale"] = Field(
        "refuse",
        description="async: a staler gradient is refused, or its lr divided by 1 + staleness.",
    )
    workers: int | None = Field(
        None, ge=1, le=100_000, description="sync: how many workers a round waits for."
    )
    quorum: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="sync: contributions that close a round at once; null: as many as workers.",
    )
    min_contributions: int = Field(
        1, ge=1, le=100_000, description="sync: fewer at the timeout abandon the round."
    )
    on_lost: Literal["shrink", "wait"] = Field(
        "shrink",
        description="sync: a worker that left is not waited for; or only quorum and timeout count.",
    )
    round_timeout_s: float | None = Field(
        None,
        ge=0.01,
        le=WEEK_S,
        description="sync: seconds from a round's first contribution to its end, at the latest.",
    )
    reduce: Literal["mean", "sum", "trimmed_mean", "median"] = Field(
        "mean", description="sync: what a round makes of its contributions."
    )
    trim: float | None = Field(
        None,
        ge=0,
        lt=0.5,
        description="sync, trimmed_mean: the part of the contributions cut at each end.",
    )
    order: Literal["arrival", "worker"] = Field(
        "arrival", description="sync: in which order contributions are added."
    )
    max_norm: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="sync: of one contribution."
    )
    on_max_norm: Literal["refuse", "clip"] = Field(
        "refuse", description="sync: a contribution of a larger norm is refused, or made smaller."
    )
    slack: int | None = Field(
        None,
        ge=0,
        lt=1 << 63,
        description="bounded: pushes that a worker may be ahead of the slowest.",
    )
    lease_s: float = Field(
        120.0,
        ge=1,
        le=86_400,
        description="Seconds without a word after which nobody waits for a worker.",
    )

    @property
    def closes_at(self) -> int:
        """Contributions that close a round."""
        return self.quorum or self.workers or 1

    @property
    def holds(self) -> bool:
        """Whether contributions are kept until their round is closed, instead of being added."""
        return self.mode == "sync" and (self.order == "worker" or self.reduce in ROBUST)


_SYNC = (
    *("workers", "quorum", "min_contributions", "on_lost", "round_timeout_s", "reduce", "trim"),
    *("order", "max_norm", "on_max_norm"),
)
_MODES: Mapping[str, str] = MappingProxyType(
    {"max_staleness": "async", "on_stale": "async", "slack": "bounded"}
    | dict.fromkeys(_SYNC, "sync")
)
_INSTEAD = {
    "max_staleness": "in sync a gradient is of the open round or refused; bounded has slack",
    "max_norm": "clip bounds the gradient of every update",
}
"""What to do where a field of another mode was meant."""


def check_update(update: Update) -> None:
    """Checks the fields of an update against each other.

    Raises:
        InvalidRequest: A field of another mode, one that is missing, or numbers that do not fit.
    """
    for name in sorted(update.model_fields_set):
        mode = _MODES.get(name, update.mode)
        if mode != update.mode and getattr(update, name) != Update.model_fields[name].default:
            more = f" ({_INSTEAD[name]})" if name in _INSTEAD else ""
            raise invalid(
                f"update.{name}",
                f"It belongs to mode {mode} and the mode is {update.mode}; leave it out{more}.",
            )
    if update.mode == "sync":
        _check_sync(update)
    if update.mode == "bounded" and update.slack is None:
        raise invalid("update.slack", "Mode bounded needs it: how far ahead a worker may be.")
    if update.on_stale == "scale" and update.max_staleness is None:
        raise invalid("update.on_stale", "scale needs max_staleness: from where on to scale.")


def _check_sync(update: Update) -> None:
    if update.workers is None:
        raise invalid("update.workers", "Mode sync needs it: how many workers a round waits for.")
    if update.round_timeout_s is None:
        raise invalid(
            "update.round_timeout_s",
            "Mode sync needs it: seconds after which a round ends without those who are missing.",
        )
    if update.closes_at > update.workers:
        raise invalid(
            "update.quorum",
            f"{update.quorum} of {update.workers} workers can't be reached; at most as many as "
            "workers.",
        )
    if update.min_contributions > update.closes_at:
        raise invalid(
            "update.min_contributions",
            f"A round is closed by {update.closes_at} contributions; ask for no more than that.",
        )
    if update.reduce == "trimmed_mean" and update.trim is None:
        raise invalid("update.trim", "trimmed_mean needs it: the part to cut at each end, as 0.1.")
    if update.reduce != "trimmed_mean" and update.trim is not None:
        raise invalid("update.trim", "It belongs to reduce: trimmed_mean; leave it out.")
    if update.max_norm is None and update.on_max_norm != "refuse":
        raise invalid("update.on_max_norm", "clip needs max_norm: the norm to clip to.")
