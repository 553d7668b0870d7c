"""The client of gradpost: post gradients, get parameters."""

from gradpost.answers import Buffer, State
from gradpost.checkpoints import Checkpoint
from gradpost.errors import (
    CertificateError,
    ClosedError,
    DeadlineExceeded,
    EpochChanged,
    GradpostError,
    MovedOn,
    NotPulled,
    RefusedError,
    RoundAbandoned,
    RoundClosed,
    StaleGradient,
    TransportError,
)
from gradpost.http import Http
from gradpost.inprocess import InProcess
from gradpost.local import LocalSteps
from gradpost.retry import Attempt, RetryPolicy
from gradpost.rounds import Contribution
from gradpost.session import Session
from gradpost.summary import Summary
from gradpost.tensors import Rows, bf16

__version__ = "0.1.0"

__all__ = [
    "Attempt",
    "Buffer",
    "CertificateError",
    "Checkpoint",
    "ClosedError",
    "Contribution",
    "DeadlineExceeded",
    "EpochChanged",
    "GradpostError",
    "Http",
    "InProcess",
    "LocalSteps",
    "MovedOn",
    "NotPulled",
    "RefusedError",
    "RetryPolicy",
    "RoundAbandoned",
    "RoundClosed",
    "Rows",
    "Session",
    "StaleGradient",
    "State",
    "Summary",
    "TransportError",
    "__version__",
    "bf16",
]
