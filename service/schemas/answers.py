"""What the server answers, for the OpenAPI document. No defaults: every member is always there."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.hyper import Optimizer
from service.schemas.around import Clip, Ema, Schedule
from service.schemas.update import Update


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
    skipped: Literal["nonfinite", "passes"] | None
    params_finite: bool = Field(description="Whether every parameter that was written is finite.")
    update_norm: float | None = Field(
        description="Of the change of all parameters; null unless the session measures norms."
    )
    param_norm: float | None = Field(
        description="Of all parameters after the update; null unless the session measures norms."
    )
    round: int | None = Field(description="Whose update this was; null outside of mode sync.")
    contributions: int | None = Field(description="Gradients in the round; passes do not count.")
    ahead: bool | None = Field(
        description="Whether the worker is too far ahead of the slowest; null outside of bounded."
    )
    wire: str | None = Field(
        description="The lossy form in which the gradient came: f16, bf16, int8, topk, int8+topk."
    )


class OpenContribution(BaseModel):
    """A push whose round is open."""

    applied: Literal[False]
    replayed: bool
    identified: Literal[True]
    round: int
    contributions: int = Field(description="Gradients so far.")
    passes: int
    missing: int = Field(description="Workers that the round waits for.")
    step: int
    epoch: int
    version: int


class Spread(BaseModel):
    """Of some numbers; null before the first."""

    last: float | None
    mean: float | None
    max: float | None


class WorkerBrief(BaseModel):
    """A worker as a list has it."""

    worker: str
    live: bool = Field(description="Whether its lease holds; nobody waits for others.")
    lease_s: float | None
    lease_left_s: float
    joined_at: float | None = Field(description="Seconds since 1970; null if it did not join.")
    next_sequence: int = Field(description="Above every number that was admitted.")
    highest: int = Field(description="-1 before the first push.")
    seen_at: float | None = Field(description="When the last push was admitted.")
    clock: int | None = Field(description="In mode bounded: applied pushes since it joined.")
    contributed: bool = Field(description="To the open round.")
    contributions: int = Field(description="Admitted pushes since the server's start.")
    passes: int
    late: int = Field(description="Pushes refused as round-closed or stale-gradient.")
    staleness: Spread = Field(description="Of its pushes, in versions.")
    lateness_s: Spread = Field(description="Of its contributions, behind the first of the round.")


class WorkerAnswer(WorkerBrief):
    """Where a worker stands in a session."""

    epoch: int
    version: int
    step: int
    round: int | None = Field(description="The open round, or the next; null outside of mode sync.")
    ranges: list[tuple[int, int]] = Field(
        description="Admitted numbers among the last 1024, as [first, last], in order."
    )
    last: dict[str, Any] | None = Field(
        description="What a repeat of its highest number would be answered."
    )


class WorkerList(BaseModel):
    """The workers of a session."""

    workers: list[WorkerBrief]
    live: int


class RoundMember(BaseModel):
    """A contribution to a round."""

    worker: str
    sequence: int
    weight: float
    lateness_s: float


class RoundAnswer(BaseModel):
    """A round."""

    round: int
    status: Literal["open", "applied", "skipped", "abandoned"]
    reason: str | None = Field(description="Why it ended; null while it is open.")
    base_version: str = Field(description="Of the parameters that its gradients are of.")
    step: int = Field(description="After it; of now while it is open.")
    epoch: int
    version: int
    contributions: int
    passes: int
    missing: int = Field(description="Workers that it waits for; 0 when it is over.")
    members: list[RoundMember] | None = Field(
        description="In order of arrival; null if the server was restarted since, or 64 rounds ago."
    )
    opened_at: float | None = Field(description="Of the first contribution; seconds since 1970.")
    closed_at: float | None
    deadline_in_s: float | None
    summary: StepSummary | None = Field(description="What its update did.")


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
