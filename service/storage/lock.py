"""The data folder: who holds it, and in which format it is.

```
DATA/LOCK         flock: one process per data folder; says who holds it
DATA/FORMAT       "gradpost data 1"
DATA/index.db     SQLite: index.py
DATA/sessions/    one folder per session, named by its incarnation: journal.py
DATA/checkpoints/ one folder per session that has some: checkpoints.py
DATA/orphans/     folders that no session owns, or that an operator gave up; never removed
DATA/ballast      room for the time when there is none: ballast.py
```
"""

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from service.storage.failures import Refused
from service.storage.files import Files, Sync

FORMAT = 1
"""Of everything in a data folder together; raised by any change that an older server misreads."""

INDEX = "index.db"
SESSIONS = "sessions"
CHECKPOINTS = "checkpoints"
ORPHANS = "orphans"
BALLAST = "ballast"
FORMAT_FILE = "FORMAT"
_LOCK = "LOCK"
_HOLDER_BYTES = 200


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds a data folder during the block, writing nothing.

    Raises:
        Refused: Another process holds it, or it is no data folder.
    """
    try:
        fd = os.open(path / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"{path} is no data folder of gradpost: {error.strerror} (LOCK).") from error
    try:
        _hold(fd, path)
        yield
    finally:
        os.close(fd)


def is_held(path: Path) -> bool:
    """Whether a process holds a data folder; False also if it is none."""
    try:
        with held(path):
            return False
    except Refused:
        return (path / _LOCK).exists()


class Lock:
    """The hold of this process on a data folder, until `release`. The kernel ends it at exit.

    Raises:
        Refused: Another process holds it.
    """

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._fd = files.open(path / _LOCK, create=True)
        try:
            _hold(self._fd, path)
            # Padded, not truncated: whoever is refused meanwhile reads a whole line.
            holder = f"process {os.getpid()} on {socket.gethostname()[:100]}\n"
            files.write(self._fd, holder.encode().ljust(_HOLDER_BYTES), 0, "LOCK")
        except BaseException:
            files.calls.close(self._fd)
            raise

    def release(self) -> None:
        """Lets another process have the folder; once is enough."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._files.calls.close(fd)


def _hold(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, _HOLDER_BYTES, 0).decode("utf-8", "replace").strip()
        raise Refused(
            f"{path} is in use by {holder or 'another process'}; stop it, or choose another "
            "GRADPOST_DATA_DIR."
        ) from error


def check_format(path: Path) -> None:
    """Refuses a data folder that this server can't read.

    Raises:
        Refused: Its format is newer, unreadable or absent.
    """
    try:
        text = (path / FORMAT_FILE).read_bytes()
    except OSError as error:
        raise Refused(
            f"{path} holds sessions and its FORMAT file is not readable ({error.strerror}); "
            "restore the folder from a backup, or name the right one."
        ) from error
    match = re.fullmatch(rb"gradpost data (\d{1,9})\n", text)
    if match is None:
        raise Refused(f"{path / FORMAT_FILE} is damaged: it says {text[:40]!r}.")
    if int(match[1]) > FORMAT:
        raise Refused(
            f"{path} has format {int(match[1])} and this server reads up to {FORMAT}; start the "
            "newer version that wrote it."
        )
    if int(match[1]) != FORMAT:
        raise Refused(f"{path / FORMAT_FILE} is damaged: there never was a format {int(match[1])}.")


def prepare(files: Files, path: Path) -> None:
    """Makes the files of a new data folder, or checks those of an old one.

    The names in it are not durable yet: `Store` syncs the folder once the index is there too.

    Raises:
        Refused: As `check_format`, or the index is gone.
    """
    if not (path / FORMAT_FILE).exists():
        files.fsync_folder(path.parent, Sync.PARENT)
    make_folders(files, path)
    if not any((path / SESSIONS).iterdir()):
        if not (path / FORMAT_FILE).exists():
            write_format(files, path)
    elif not (path / INDEX).exists():
        raise Refused(f"{path} holds sessions and its index.db is gone; restore it from a backup.")
    check_format(path)


def make_folders(files: Files, path: Path) -> None:
    """Makes the folders of a data folder that are not there."""
    for name in (SESSIONS, CHECKPOINTS, ORPHANS):
        files.make_folder(path / name)


def write_format(files: Files, path: Path) -> None:
    """Says in which format a data folder is."""
    files.replace(path / FORMAT_FILE, b"gradpost data %d\n" % FORMAT, Sync.FORMAT)


def make_free(files: Files, path: Path) -> None:
    """Makes the file by which a copy of a data folder can be held; nobody holds it."""
    with files.created(path / _LOCK):
        pass
