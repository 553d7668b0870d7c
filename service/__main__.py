"""`python -m service serve | health | warm | check | backup | forget`: around the application."""

import argparse
import ctypes
import dataclasses
import http.client
import json
import os
import shutil
import signal
import socket
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from pydantic import ValidationError

from service import logs
from service.settings import Settings

MIB = 1 << 20
# glibc's mallopt numbers. Both or neither: setting one freezes the other's default, which is
# slower than setting none; together they halve the cost of receiving a large body.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# A kernel that waits for the GIL beside a busy thread waits this long at most; Python's own
# 5 ms is many times a small step.
_SWITCH_INTERVAL_S = 0.0005
_BACKUP_S = 3600.0
"""Seconds that a server may take over a backup."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that the arguments name and returns the exit status."""
    options = _parser().parse_args(arguments)
    given = {
        name: value
        for name, value in vars(options).items()
        if name in Settings.model_fields and value is not None
    }
    if options.command == "warm":
        return _warm(options.rules)
    if options.command in _OFFLINE:
        return _OFFLINE[options.command](options)
    try:
        settings = Settings(**given)
    except ValidationError as error:
        print(_explain(error), file=sys.stderr)
        return 2
    return {"serve": serve, "health": health}[options.command](settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service", description="Settings are GRADPOST_*: docs/configuration.md."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("serve", help="start the server")
    probe = commands.add_parser("health", help="exit 0 if a server here is ready, else 1")
    for command in (start, probe):
        command.add_argument("--host")
        command.add_argument("--port", type=int)
        command.add_argument("--uds", help="Unix socket path, instead of host and port")
    start.add_argument("--log-level", choices=sorted(logs.LEVELS))
    warm = commands.add_parser("warm", help="compile kernels into the cache")
    warm.add_argument("rules", nargs="*", help="rules; all if none is named")
    check = commands.add_parser("check", help="examine a data folder that no server holds")
    check.add_argument("--session", help="only the session of this id")
    backup = commands.add_parser("backup", help="copy a data folder, of a server that runs too")
    backup.add_argument("--to", type=Path, required=True, help="a folder that is to be made")
    forget = commands.add_parser("forget", help="give up a session that is damaged")
    forget.add_argument("--session", required=True, help="its id")
    folder = os.environ.get("GRADPOST_DATA_DIR")
    for command in (check, backup, forget):
        command.add_argument("--data-dir", type=Path, default=folder, required=not folder)
    return parser


def _explain(error: ValidationError) -> str:
    """One line per bad setting, under its environment name; values are left out (a key is one)."""
    lines = (
        f"  GRADPOST_{'_'.join(str(part) for part in item['loc']).upper()}: {item['msg']}"
        if item["loc"]
        else f"  {item['msg'].removeprefix('Value error, ')}"  # of several settings together
        for item in error.errors(include_input=False, include_url=False)
    )
    return "\n".join(("gradpost does not start; see docs/configuration.md:", *lines))


class Server(uvicorn.Server):
    """uvicorn's server that says where it listens, and is not ready once a stop was asked for."""

    def __init__(self, config: uvicorn.Config, app: Any) -> None:
        super().__init__(config)
        self._gradpost = app
        self._settings: Settings = app.state.settings
        self._log = logs.make(self._settings)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts, then prints the one line for people."""
        await super().startup(sockets)
        if not self.started:
            return
        settings = self._settings
        if settings.uds:  # uvicorn opens it to everybody
            os.chmod(settings.uds, int(settings.uds_mode, 8))
        print(f"gradpost listens on {self.address()}", flush=True)
        self._log.info(
            "started",
            address=self.address(),
            key=settings.api_key is not None,
            threads=settings.threads,
            memory_bytes=settings.memory_bytes,
            data_dir=None if settings.data_dir is None else str(settings.data_dir),
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Not ready first, so that a probe on an open connection sees it; then uvicorn's drain."""
        self._gradpost.state.ready.stop()
        sessions = self._gradpost.state.sessions
        self._log.info("stopping", sessions_lost=sessions.lost)
        sessions.dismiss()
        await super().shutdown(sockets)
        if self._settings.uds:
            Path(self._settings.uds).unlink(missing_ok=True)

    def address(self) -> str:
        """URL or socket path that clients use, with the real port where 0 was asked for."""
        if self.config.uds:
            return f"unix:{self.config.uds}"
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def configuration(app: Any, settings: Settings) -> uvicorn.Config:
    """Uvicorn's configuration for our settings."""
    from service.connection import ConnectionLimits, connection_class

    limits = ConnectionLimits(
        **{
            field.name: getattr(settings, field.name)
            for field in dataclasses.fields(ConnectionLimits)
        }
    )
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        uds=settings.uds,
        http=connection_class(limits),
        loop="uvloop",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # who connects is the peer, whatever a header claims
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=settings.shutdown_timeout_s,
    )


def unknown_settings(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none: a misspelt one must not pass unseen."""
    known = {f"GRADPOST_{name.upper()}" for name in Settings.model_fields}
    return sorted(
        name for name in environment if name.startswith("GRADPOST_") and name not in known
    )


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT, drains, and returns 0; 1 if the address is taken."""
    _tune()
    log = logs.make(settings)
    logs.bridge(log)
    for name in unknown_settings(os.environ):
        log.warning("no such setting", variable=name, see="docs/configuration.md")
    previous = _catch_stop()
    try:
        from service.app import create_app  # after mallopt: importing allocates
        from service.storage.failures import NoSpace, Refused, StorageFailure

        if settings.uds and not _free(settings.uds):
            return 1
        try:
            app = create_app(settings)
        except (Refused, NoSpace, StorageFailure) as error:
            print(f"gradpost does not start: {error}", file=sys.stderr)
            return 1
        Server(configuration(app, settings), app).run()
    except SystemExit as end:  # uvicorn's way to say that it could not start
        return 1 if end.code else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _tune() -> None:
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
            mallopt(_M_TRIM_THRESHOLD, 512 * MIB)


def _catch_stop() -> dict[signal.Signals, Any]:
    """Makes a stop before and after uvicorn's own handling a quiet exit with status 0.

    uvicorn raises a captured signal again once it has drained; by default that would end the
    process with the signal's status instead of 0.
    """
    began = {"stop": False}

    def stop(number: int, frame: FrameType | None) -> None:
        if not began["stop"]:
            began["stop"] = True
            raise SystemExit(0)

    return {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}


def _free(path: str) -> bool:
    """Removes the socket of a server that is gone; False if one answers, or it is another file."""
    try:
        if not stat.S_ISSOCK(Path(path).stat().st_mode):
            print(f"{path} exists and is no socket; choose another path.", file=sys.stderr)
            return False
    except FileNotFoundError:
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            Path(path).unlink(missing_ok=True)
            return True
    print(f"A server listens on {path} already.", file=sys.stderr)
    return False


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connects to the socket's path."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(settings: Settings, timeout_s: float) -> http.client.HTTPConnection:
    """To the server that these settings describe."""
    if settings.uds:
        return _UnixConnection(settings.uds, timeout_s)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return http.client.HTTPConnection(host, settings.port, timeout=timeout_s)


def health(settings: Settings) -> int:
    """0 if the server that these settings describe is ready, else 1 and why, on stderr."""
    connection = _connection(settings, 3.0)
    try:
        connection.request("GET", "/health/ready")
        answer = connection.getresponse()
        body = answer.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if answer.status != 200:
        print(body, file=sys.stderr)
        return 1
    return 0


def _check(options: argparse.Namespace) -> int:
    from service.storage import check

    return check.run(options.data_dir, options.session)


def _backup(options: argparse.Namespace) -> int:
    from service.storage import lock, offline

    if lock.is_held(options.data_dir):
        return _live_backup(options.data_dir, options.to)
    return offline.backup(options.data_dir, options.to)


def _live_backup(path: Path, to: Path) -> int:
    """Has the server that holds the folder make the copy, and moves it where it is wanted."""
    if to.exists():
        print(f"{to} exists already; name another folder.", file=sys.stderr)
        return 2
    if not to.absolute().parent.is_dir():
        print(f"There is no folder {to.absolute().parent}; make it first.", file=sys.stderr)
        return 2
    settings = Settings()
    key = settings.api_key
    headers = {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}
    connection = _connection(settings, _BACKUP_S)
    try:
        connection.request("POST", "/v1/server/backup", headers=headers)
        answer = connection.getresponse()
        found = json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(
            f"{path} is held by a server, and none answers at {settings.uds or settings.host}"
            f"{'' if settings.uds else f':{settings.port}'}; set GRADPOST_HOST and GRADPOST_PORT, "
            f"or GRADPOST_UDS, as that server has them ({error}).",
            file=sys.stderr,
        )
        return 2
    finally:
        connection.close()
    if answer.status != 201:
        print(found.get("detail", found), file=sys.stderr)
        return 2
    ours = path.resolve()
    if Path(found["folder"]).parent != ours.with_name(f"{ours.name}-backups"):
        print(
            f"The server holds another folder than {path}; its copy is {found['folder']}.",
            file=sys.stderr,
        )
        return 2
    shutil.move(found["folder"], to)
    for one in found["damaged"]:
        print(f"{one['session']}: {one['what']} ({one['where']})")
    print(f"{to} is a backup of {path}: {found['bytes']} bytes, {found['sessions']} sessions.")
    if found["left_out"]:
        print(f"{found['left_out']} sessions of durability none are on no disk, and not in it.")
    return 1 if found["damaged"] else 0


def _forget(options: argparse.Namespace) -> int:
    from service.storage import offline

    return offline.forget(options.data_dir, options.session)


_OFFLINE: dict[str, Callable[[argparse.Namespace], int]] = {
    "check": _check,
    "backup": _backup,
    "forget": _forget,
}


def _warm(rules: list[str]) -> int:
    from kernels.registry import RULES
    from service.warm import warm

    unknown = sorted(set(rules) - set(RULES))
    if unknown:
        print(f"no such rule: {', '.join(unknown)}; known: {', '.join(RULES)}", file=sys.stderr)
        return 2
    cpu = os.environ.get("NUMBA_CPU_NAME", "this processor")
    print(f"{warm(rules or list(RULES))} kernels compiled for {cpu}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
