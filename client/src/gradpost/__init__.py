"""The client of gradpost: post gradients, get parameters."""

from gradpost.answers import Buffer, State
from gradpost.checkpoints import Checkpoint
from gradpost.errors import (
    CertificateError,
    ClosedError,
    DeadlineExceeded,
    EpochChanged,
    GradpostError,
    NotPulled,
    RefusedError,
    StaleGradient,
    TransportError,
)
from gradpost.http import Http
from gradpost.inprocess import InProcess
from gradpost.retry import Attempt, RetryPolicy
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
    "DeadlineExceeded",
    "EpochChanged",
    "GradpostError",
    "Http",
    "InProcess",
    "NotPulled",
    "RefusedError",
    "RetryPolicy",
    "Rows",
    "Session",
    "StaleGradient",
    "State",
    "Summary",
    "TransportError",
    "__version__",
    "bf16",
]
