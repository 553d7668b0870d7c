"""Structured logs: one JSON object a line on stderr, made per application and never global."""

import functools
import json
import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

from service.settings import Settings

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

Event = MutableMapping[str, Any]
# structlog's JSONRenderer and TimeStamper build an encoder and a datetime for every line: with
# these two a line costs 10 us instead of 26.
_ENCODE = json.JSONEncoder(default=repr, check_circular=False).encode


@functools.lru_cache(maxsize=2)
def _second(now: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))


def _stamp(logger: Any, method: str, event: Event) -> Event:
    now = time.time()
    whole = int(now)
    event["time"] = f"{_second(whole)}.{int((now - whole) * 1e6):06d}Z"
    event["level"] = method
    return event


def _render(logger: Any, method: str, event: Event) -> str:
    return _ENCODE(event)


def make(settings: Settings, stream: TextIO | None = None) -> Any:
    """A logger that writes as the settings say.

    Args:
        settings: `log_level` and `log_format` are read.
        stream: Where lines go; stderr if None.
    """
    console = settings.log_format == "console"
    processors: list[Any] = [_stamp]
    if console:
        processors.append(structlog.dev.ConsoleRenderer(colors=False, timestamp_key="time"))
    else:
        processors += [structlog.processors.format_exc_info, _render]
    return structlog.wrap_logger(
        structlog.WriteLogger(stream or sys.stderr),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[settings.log_level]),
        cache_logger_on_first_use=True,
    ).bind()


class Bridge(logging.Handler):
    """Sends records of the standard library's loggers (uvicorn, asyncio) into ours.

    Args:
        logger: What `make` returned.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record; a failure to write is reported, never raised."""
        try:
            extra = {"exc_info": record.exc_info} if record.exc_info else {}
            level = min(max(record.levelno // 10 * 10, 10), 50)
            self._logger.log(level, record.getMessage(), logger=record.name, **extra)
        except Exception:
            self.handleError(record)


def bridge(logger: Any) -> None:
    """Makes our logger the only handler of the standard library's root logger."""
    root = logging.getLogger()
    root.handlers[:] = [Bridge(logger)]
    # uvicorn tells each start and stop at info; `serve` has a line of its own for people.
    root.setLevel(logging.WARNING)
