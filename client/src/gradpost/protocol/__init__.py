"""What both sides of the wire share: names, the safetensors header codec, versions, dtypes."""

from collections.abc import Mapping
from types import MappingProxyType

from gradpost.protocol.tensors import MAX_HEADER_BYTES

SAFETENSORS = "application/vnd.safetensors"
OCTET = "application/octet-stream"
JSON = "application/json"
PROBLEM = "application/problem+json"

EPOCH = "Gradpost-Epoch"
VERSION = "Gradpost-Version"
STEP = "Gradpost-Step"
INCARNATION = "Gradpost-Incarnation"
SUMMARY = "Gradpost-Summary"
SINCE = "Gradpost-Since"
REQUEST_ID = "X-Request-Id"

PROBLEM_PREFIX = "/problems/"

_FINAL = (
    "bad-request invalid-json key-missing key-required key-wrong origin-refused "
    "session-unknown worker-unknown checkpoint-unknown checkpoint-exists data-dir-missing "
    "session-damaged disk-full not-found method-not-allowed not-acceptable spec-differs "
    "structural too-old worker-retired epoch-changed version-unknown stale-gradient "
    "params-missing average-missing device-unavailable session-gone length-required "
    "precondition-failed body-too-large unsupported-media-type unsupported-encoding "
    "invalid-request not-supported-yet invalid-tensors tensor-mismatch nonfinite key-reused "
    "too-many-workers insufficient-memory backup-refused backup-failed round-unknown round-closed "
    "round-abandoned already-contributed overrides-differ norm-exceeded sparse-unsupported"
).split()
_RETRYABLE = (
    "request-timeout in-flight version-pending too-many-sessions overloaded log-full internal "
    "shutting-down recovering"
).split()

PROBLEMS: Mapping[str, bool] = MappingProxyType(
    dict.fromkeys(_FINAL, False) | dict.fromkeys(_RETRYABLE, True)
)
"""Slug of every problem type → whether the same bytes may be sent again."""

__all__ = [
    "EPOCH",
    "INCARNATION",
    "JSON",
    "MAX_HEADER_BYTES",
    "OCTET",
    "PROBLEM",
    "PROBLEMS",
    "PROBLEM_PREFIX",
    "REQUEST_ID",
    "SAFETENSORS",
    "SINCE",
    "STEP",
    "SUMMARY",
    "VERSION",
]
