"""Versions of parameters as text: `epoch-version`, or the bare number while the epoch is 1."""

import re

_TEXT = re.compile(r"(?:([0-9]{1,19})-)?([0-9]{1,19})")
_TAG = re.compile(r'"(?:epoch-([0-9]{1,19})|([0-9]{1,19})-([0-9]{1,19})(?:-[^"]*)?)"')
_LIMIT = 1 << 63


def format_version(epoch: int, version: int) -> str:
    """`(1, 7)` → `"1-7"`."""
    return f"{epoch}-{version}"


def parse_version(value: str | int) -> tuple[int, int]:
    """`"1-7"`, `"7"` or `7` → `(1, 7)`.

    Raises:
        ValueError: Not a version.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("A version is a whole number, or text such as 1-7.")
    if isinstance(value, int):
        epoch, version = 1, value
    else:
        match = _TEXT.fullmatch(value)
        if match is None:
            raise ValueError(f"{value[:40]!r} is no version; write epoch-version, as in 1-7.")
        epoch, version = int(match[1] or 1), int(match[2])
    if not (1 <= epoch < _LIMIT and 0 <= version < _LIMIT):
        raise ValueError("A version lies from 0 to 2**63 - 1, in an epoch from 1 to 2**63 - 1.")
    return epoch, version


def etag(epoch: int, version: int, representation: str) -> str:
    """The strong entity tag of one representation of one version."""
    return f'"{epoch}-{version}-{representation}"'


def epoch_tag(epoch: int) -> str:
    """What If-Match names for any version of an epoch."""
    return f'"epoch-{epoch}"'


def parse_tag(tag: str) -> tuple[int, int | None]:
    """What If-Match asks for: `"1-7"` or an `etag` of it → `(1, 7)`; `"epoch-3"` → `(3, None)`.

    Raises:
        ValueError: It names no version.
    """
    match = _TAG.fullmatch(tag)
    if match is None:
        raise ValueError(f"{tag[:80]!r} names no version.")
    if match[1]:
        return int(match[1]), None
    return int(match[2]), int(match[3])
