"""Pydantic requests and answers; hyperparameters are in `service.hyper`."""

from service.schemas.answers import (
    HistoryAnswer,
    LayoutEntry,
    ParamsAnswer,
    PatchedSession,
    Problem,
    SessionInfo,
    SessionList,
    StateAnswer,
    StepSummary,
)
from service.schemas.control import (
    Prefer,
    PushControl,
    check_id,
    one_of_each,
    parse_base,
    parse_control,
    parse_count,
    parse_prefer,
)
from service.schemas.spec import CreateSession, Spec, Update, apply_patch, diff, parse_spec

__all__ = [
    "CreateSession",
    "HistoryAnswer",
    "LayoutEntry",
    "ParamsAnswer",
    "PatchedSession",
    "Prefer",
    "Problem",
    "PushControl",
    "SessionInfo",
    "SessionList",
    "Spec",
    "StateAnswer",
    "StepSummary",
    "Update",
    "apply_patch",
    "check_id",
    "diff",
    "one_of_each",
    "parse_base",
    "parse_control",
    "parse_count",
    "parse_prefer",
    "parse_spec",
]
