"""What the server answers, for the OpenAPI document. No defaults: every member is always there."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.hyper import Optimizer
from service.schemas.spec import Update


class Problem(BaseModel):
    """An RFC 9457 problem document; further members depend on the type."""

    model_config = ConfigDict(extra="allow")
    type: str = Field(description="`/problems/` and a stable name.")
    title: str
    status: int
    detail: str = Field(description="What was wrong and what to do.")
    retryable: bool = Field(description="Whether the same bytes may be sent again.")


class StepSummary(BaseModel):
    """What a push did."""

    step: int = Field(description="Completed updates of the session.")
    epoch: int
    version: int
    applied: bool
    replayed: bool = Field(description="This answers a repeat; nothing was applied now.")
    identified: bool = Field(description="The push had a worker and a sequence: retry it freely.")
    staleness: int
    lr: float
    grad_norm: float | None = Field(description="Of the whole gradient; null if not finite.")
    clipped: bool
    skipped: Literal["nonfinite"] | None
    params_finite: bool
    round: int | None


class LayoutEntry(BaseModel):
    """One tensor of a session."""

    name: str
    dtype: str = Field(description="As it was uploaded.")
    shape: list[int]
    offset: int = Field(description="In elements of the flat vector.")
    count: int = Field(description="Updates of this tensor.")


class SessionInfo(BaseModel):
    """Everything about a session."""

    id: str
    status: Literal["empty", "ready", "broken"]
    attached: bool
    revision: int
    step: int
    epoch: int
    version: int
    optimizer: Optimizer
    device: str
    dtype: Literal["F32", "F64"]
    update: Update
    missing: str
    on_nonfinite: str
    durability: str
    layout: list[LayoutEntry]
    workers: int
    created_at: float
    bytes: dict[str, int]
    max_push_bytes: int | None


class PatchedSession(SessionInfo):
    """A session after a change."""

    acts_from_step: int = Field(description="The first update under the new specification.")


class SessionList(BaseModel):
    """A page of sessions, in order of their ids."""

    sessions: list[SessionInfo]
    next: str | None = Field(description="Pass as `after` for the next page; null at the end.")


class ParamsAnswer(BaseModel):
    """Parameters as JSON."""

    epoch: int
    version: int
    step: int
    params: dict[str, Any]


class StateAnswer(BaseModel):
    """The optimizer state as JSON."""

    epoch: int
    version: int
    step: int
    rule: str
    counts: dict[str, int]
    state: dict[str, Any]


class HistoryAnswer(BaseModel):
    """The last steps, the oldest first."""

    steps: list[dict[str, Any]]
