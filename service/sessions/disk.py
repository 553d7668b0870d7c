"""The data folder of a server: the store in it, and the threads that wait for the disk."""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn, TypeVar

import structlog

from service.errors import BackupFailed, BackupRefused, DiskFull
from service.storage.backup import Backup
from service.storage.failures import CopyFailed, NoSpace, Refused, StorageFailure
from service.storage.files import Files
from service.storage.store import Store

T = TypeVar("T")
FLUSH_S = 0.05
"""Between two writes of witnesses; the storage wants one every 100 ms."""
THREADS = 4
EXIT = 74
"""EX_IOERR: the process ended because nobody knows any more what the disk holds."""


class Disk:
    """Opens a data folder and holds it until `close`.

    A `StorageFailure` ends the process at once: going on would build on what may not be there,
    and a second fsync after a failed one proves nothing. The next start finds out what holds.

    Args:
        path: The folder.
        log: Where a failure is told.
        files: The calls of the operating system; tests pass others.

    Raises:
        Refused: The folder is in use, newer, damaged, or not to be made.
        NoSpace: The disk is full.
        StorageFailure: It can't be written.
    """

    def __init__(
        self,
        path: Path,
        log: "structlog.stdlib.BoundLogger",
        files: Files | None = None,
    ) -> None:
        self.path = path
        self.log = log
        self.store = Store(path, files)
        self._threads = ThreadPoolExecutor(THREADS, "gradpost-disk")
        self._stopped = threading.Event()
        self._flusher = threading.Thread(target=self._flush, name="gradpost-flush", daemon=True)
        self._flusher.start()

    async def run(self, work: Callable[[], T]) -> T:
        """Runs work that waits for the disk in a thread of its own.

        Raises:
            DiskFull: There was no room; what was asked for did not happen.
        """
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._threads, self.guarded(work)))

    def guarded(self, work: Callable[[], T]) -> Callable[[], T]:
        """Work whose failures are ours: a full disk is a refusal, any other ends the process."""

        def run() -> T:
            try:
                return work()
            except NoSpace as error:
                raise DiskFull(
                    f"The disk is full ({error}); nothing was changed. Make room, then send the "
                    "same request again."
                ) from error
            except StorageFailure as error:
                self.fail(error)

        return run

    def fail(self, error: StorageFailure) -> NoReturn:
        """Says what failed and ends the process."""
        self.log.critical(
            "the disk failed: the server ends at once and recovers at its next start",
            error=str(error),
            data_dir=str(self.path),
        )
        os._exit(EXIT)

    async def backup(self, name: str) -> tuple[Path, Backup]:
        """Makes a copy of the data folder, beside it, while the sessions go on.

        Args:
            name: Of the copy's folder, in `<data folder>-backups`; there is none of this name.

        Raises:
            BackupRefused: There is one, or one is being made, or the recovery is not over.
            BackupFailed: It could not be written; nothing is left.
            DiskFull: There was no room; nothing is left.
        """
        folder = self.path.resolve()
        to = folder.with_name(f"{folder.name}-backups") / name

        def make() -> Backup:
            to.parent.mkdir(mode=0o700, exist_ok=True)
            return self.store.backup(to)

        try:
            return to, await self.run(make)
        except Refused as error:
            raise BackupRefused(str(error), folder=str(to)) from error
        except (CopyFailed, OSError) as error:
            raise BackupFailed(
                f"The backup could not be made and nothing is left of it: {error}", folder=str(to)
            ) from error

    def _flush(self) -> None:
        """Writes the witnesses of committed records, many at a time."""
        full = False
        while not self._stopped.wait(FLUSH_S):
            try:
                self.store.flush()
            except NoSpace as error:
                if not full:
                    self.log.warning("no room for the index; the log goes on", error=str(error))
                full = True
            except StorageFailure as error:
                self.fail(error)
            else:
                full = False

    def close(self) -> None:
        """Ends the threads, writes what waits, lets go of the folder; journals are closed."""
        self.store.end_backup()
        self._stopped.set()
        self._flusher.join()
        self._threads.shutdown()
        self.guarded(self.store.close)()
