"""What the server answers, for the OpenAPI document. No defaults: every member is always there."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.hyper import Optimizer
from service.schemas.around import Clip, Ema, Schedule
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
    lr: float = Field(description="Of the default group in this update.")
    grad_norm: float | None = Field(
        description="Of the gradient, divided by grad_scale, before clipping; null if not finite."
    )
    clipped: bool = Field(description="Whether clipping made any gradient smaller.")
    skipped: Literal["nonfinite"] | None
    params_finite: bool = Field(description="Whether every parameter that was written is finite.")
    update_norm: float | None = Field(
        description="Of the change of all parameters; null unless the session measures norms."
    )
    param_norm: float | None = Field(
        description="Of all parameters after the update; null unless the session measures norms."
    )
    round: int | None = Field(description="Null; rounds come with update mode sync.")


class WorkerAnswer(BaseModel):
    """Where a worker stands in a session."""

    worker: str
    epoch: int
    version: int
    step: int
    next_sequence: int = Field(description="Above every number that was admitted.")
    highest: int
    ranges: list[tuple[int, int]] = Field(
        description="Admitted numbers among the last 1024, as [first, last], in order."
    )
    seen_at: float = Field(description="When the last push was admitted, seconds since 1970.")
    last: StepSummary | None = Field(description="What the push of the highest number did.")


class CheckpointInfo(BaseModel):
    """A checkpoint on the server's disk."""

    name: str
    bytes: int
    digest: str = Field(description="xxh3_128 of the file, in hex; also its ETag.")
    made_at: float = Field(description="Seconds since 1970.")


class CheckpointList(BaseModel):
    """The checkpoints of a session, the oldest first."""

    checkpoints: list[CheckpointInfo]


class BackupInfo(BaseModel):
    """A copy of the data folder."""

    folder: str = Field(description="On the server's machine.")
    bytes: int
    sessions: int
    checkpoints: int
    damaged: list[dict[str, str]] = Field(description="What is damaged there as it is here.")
    left_out: int = Field(description="Sessions of durability none, which are on no disk.")


class LayoutEntry(BaseModel):
    """One tensor of a session."""

    name: str
    dtype: str = Field(description="As it was uploaded.")
    shape: list[int]
    offset: int = Field(description="In elements of the flat vector.")
    group: str
    count: int = Field(description="Updates of this tensor.")


class SessionBrief(BaseModel):
    """A session as a list has it."""

    id: str
    status: Literal["empty", "ready", "broken"]
    attached: bool = Field(description="Only in the answer to a PUT: it existed already.")
    incarnation: str = Field(description="Another one for each creation under an id.")
    revision: int = Field(description="Counts changes of the specification.")
    step: int
    epoch: int
    version: int
    optimizer: Optimizer
    groups: list[dict[str, Any]] = Field(
        description="Beside the default one; each with every effective hyperparameter."
    )
    clip: Clip | None
    schedule: Schedule | None
    ema: Ema | None
    norms: bool
    device: str
    dtype: Literal["F32", "F64"]
    update: Update
    missing: str
    on_nonfinite: str
    durability: str
    tensors: int
    workers: int = Field(description="Whose sequence numbers are remembered.")
    created_at: float = Field(description="Seconds since 1970.")
    bytes: dict[str, int] = Field(description="Reserved in all; of the parameters, and so on.")
    max_push_bytes: int | None = Field(
        description="The largest body of a push: the widest gradient and the largest header."
    )


class SessionInfo(SessionBrief):
    """Everything about a session."""

    layout: list[LayoutEntry]


class PatchedSession(SessionInfo):
    """A session after a change."""

    acts_from_step: int = Field(description="The first update under the new specification.")


class SessionList(BaseModel):
    """A page of sessions, in order of their ids."""

    sessions: list[SessionBrief]
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


class ScheduleAnswer(BaseModel):
    """Learning rates of the updates to come."""

    step: int = Field(description="Completed updates; the first rate is that of the next one.")
    lr: dict[str, list[float]] = Field(description="By group; without overrides and staleness.")


class HistoryAnswer(BaseModel):
    """The last steps, the oldest first."""

    steps: list[dict[str, Any]]
