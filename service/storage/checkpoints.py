"""Checkpoints: whole files that users make of a session, by name.

```
checkpoints/<owner>/<name>.<digest>.safetensors     digest: xxh3_128 of the file, 32 hex digits
checkpoints/<owner>/.<number>.tmp                   one that is being written
```

A file's name is all that there is to know about it, so it verifies itself, and no row need name
it: a session that has no folder of its own has checkpoints too, and they outlive it. The rename is
the commit. A checkpoint that replaces another of its name is durable before that one is removed;
where a crash leaves both, the newer one counts, and the next start removes the other.
"""

import contextlib
import itertools
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from service.storage.failures import Damaged, NoSpace, Overtaken
from service.storage.files import Bytes, Files, Pace, Sync
from service.storage.snapshots import digest_of

SUFFIX = ".safetensors"
DRAFT = ".tmp"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FILE = re.compile(rf"({_NAME.pattern})\.([0-9a-f]{{32}}){re.escape(SUFFIX)}")
_FOLDER = re.compile(r"[0-9a-f]{32}")


class Checkpoint(NamedTuple):
    """A durable checkpoint.

    Attributes:
        owner: The key of its session, `owner_of` its id.
        name: Chosen by its user.
        size: Bytes.
        digest: xxh3_128 of it.
        made_at: Seconds since 1970.
    """

    owner: bytes
    name: str
    size: int
    digest: bytes
    made_at: float

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.{self.digest.hex()}{SUFFIX}"


def owner_of(session: str) -> bytes:
    """What the folder of a session's checkpoints is named by: of its id, not its incarnation.

    So a session that is created anew under the id of a lost one finds the checkpoints of that.
    """
    return xxhash.xxh3_128_digest(session.encode())


def check_name(name: str) -> None:
    """Refuses what is no name of a checkpoint.

    Raises:
        ValueError: It is none.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a checkpoint's name has 1 to 128 of A-Z a-z 0-9 . _ - and begins with a letter or a "
            f"digit; {name[:200]!r} does not"
        )


def read_folder(folder: Path) -> Iterator[Checkpoint]:
    """The checkpoints in the folder of a session, also those that others replace, as they come.

    What is no checkpoint, or goes meanwhile, is passed over.
    """
    owner = bytes.fromhex(folder.name)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            match = _FILE.fullmatch(name)
            if match is not None:
                with contextlib.suppress(FileNotFoundError):
                    facts = (folder / name).stat()
                    digest = bytes.fromhex(match[2])
                    yield Checkpoint(owner, match[1], facts.st_size, digest, facts.st_mtime)


def newest(found: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Of each name the one that counts, oldest first."""
    by_name = {one.name: one for one in sorted(found, key=_age)}
    return sorted(by_name.values(), key=_age)


def _named(folder: Path, name: str) -> list[Checkpoint]:
    """All of one name: two where a crash has cut a replacement short."""
    return [one for one in read_folder(folder) if one.name == name]


def _age(one: Checkpoint) -> tuple[float, str]:
    return one.made_at, one.file


def is_session(name: str) -> bool:
    """Whether a folder can be that of a session's checkpoints."""
    return _FOLDER.fullmatch(name) is not None


class Checkpoints:
    """All checkpoints of a data folder. Any thread may call.

    Args:
        files: The calls.
        root: The folder of all of them.
    """

    def __init__(self, files: Files, root: Path) -> None:
        self._files = files
        self._root = root
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._drafts: set[Path] = set()

    # Making

    def write(
        self, owner: bytes, name: str, chunks: Iterable[Bytes], size: int | None = None
    ) -> Checkpoint:
        """Writes a checkpoint, durable when this returns, in the place of one of this name.

        Args:
            owner: `owner_of` its session's id.
            name: 1 to 128 of `A-Za-z0-9._-`; the first is a letter or a digit.
            chunks: Its bytes. What they raise is raised, and nothing is left.
            size: How many they are, if that is known: room for them is reserved first.

        Raises:
            ValueError: The name is none.
            NoSpace: The disk is full; nothing is left, and one of this name stands.
            Overtaken: `drop` came first; nothing is left.
            StorageFailure: A write or a sync failed.
        """
        check_name(name)
        draft, fd = self._begin(self._folder(owner))
        try:
            try:
                made = self._fill(fd, owner, name, chunks, size)
            finally:
                self._files.calls.close(fd)
            return self._publish(draft, made)
        except Exception:
            self._give_up(draft)
            raise

    def _begin(self, folder: Path) -> tuple[Path, int]:
        """An open draft in a folder that stays as long as the draft does."""
        with self._lock:
            self._files.make_folder(folder)
            draft = folder / f".{next(self._numbers)}{DRAFT}"
            try:
                fd = self._files.open(draft, create=True)
            except NoSpace:
                self._prune(folder)
                raise
            self._drafts.add(draft)
            return draft, fd

    def _fill(
        self, fd: int, owner: bytes, name: str, chunks: Iterable[Bytes], size: int | None
    ) -> Checkpoint:
        """Writes a draft, durable except for its name."""
        hasher = xxhash.xxh3_128()
        pace = Pace(self._files, fd, Sync.CHECKPOINT)
        written = 0
        what = f"writing checkpoint {name}"
        if size:
            self._files.allocate(fd, size, f"reserving room for checkpoint {name}")
        for chunk in chunks:
            data = memoryview(chunk).cast("B")
            hasher.update(data)
            self._files.write(fd, data, written, what)
            written += len(data)
            pace.wrote(len(data))
        self._files.truncate(fd, written, what)
        self._files.fsync(fd, Sync.CHECKPOINT)
        return Checkpoint(owner, name, written, hasher.digest(), os.fstat(fd).st_mtime)

    def _publish(self, draft: Path, made: Checkpoint) -> Checkpoint:
        """Gives a durable draft its name, then removes what it replaces."""
        folder = draft.parent
        with self._lock:
            if draft not in self._drafts:
                raise Overtaken("the session was deleted while a checkpoint of it was written")
            before = _named(folder, made.name)
            self._files.rename(draft, folder / made.file)
            self._drafts.discard(draft)
            self._files.fsync_folder(folder, Sync.CHECKPOINT_NAME)
            # Also where the folder was there: nobody may have synced its name yet.
            self._files.fsync_folder(self._root, Sync.CHECKPOINTS_FOLDER)
            with contextlib.suppress(NoSpace):  # committed: nothing may look like a refusal
                self._remove(folder, [one for one in before if one.file != made.file])
        return made

    def _give_up(self, draft: Path) -> None:
        """Removes a draft, unless it is gone, or has its name by now."""
        with self._lock:
            if draft in self._drafts:
                self._drafts.discard(draft)
                self._files.unlink(draft)
                self._prune(draft.parent)

    # Reading

    def list(self, owner: bytes) -> list[Checkpoint]:
        """The checkpoints of a session, oldest first."""
        return newest(read_folder(self._folder(owner)))

    def find(self, owner: bytes, name: str) -> Checkpoint | None:
        """The checkpoint of this name; None if there is none.

        Raises:
            ValueError: The name is none.
        """
        check_name(name)
        found = newest(_named(self._folder(owner), name))
        return found[0] if found else None

    def open(self, checkpoint: Checkpoint) -> Path:
        """The file to read it from. Once it is deleted, only who has it open can read on."""
        check_name(checkpoint.name)
        return self._folder(checkpoint.owner) / checkpoint.file

    def verify(self, checkpoint: Checkpoint) -> None:
        """Reads a checkpoint and compares it with its digest.

        Raises:
            Damaged: It is missing, unreadable, or not what was written.
        """
        try:
            _, digest = digest_of(self._files, self.open(checkpoint))
        except FileNotFoundError:
            raise Damaged("the checkpoint is missing", checkpoint.file) from None
        except OSError as error:
            raise Damaged(f"the disk can't read it: {error.strerror}", checkpoint.file) from error
        if digest != checkpoint.digest:
            raise Damaged("the checkpoint is not what was written", checkpoint.file)

    def owners(self) -> tuple[bytes, ...]:
        """The keys of the sessions of which there are checkpoints, or were."""
        names = os.listdir(self._root) if self._root.is_dir() else []
        return tuple(bytes.fromhex(name) for name in sorted(names) if is_session(name))

    # Removing

    def delete(self, owner: bytes, name: str) -> bool:
        """Removes a checkpoint, durably; False if there is none of this name.

        Raises:
            ValueError: The name is none.
        """
        check_name(name)
        folder = self._folder(owner)
        with self._lock:
            found = _named(folder, name)
            self._remove(folder, found)
            self._prune(folder)
        return bool(found)

    def drop(self, owner: bytes) -> None:
        """Removes all checkpoints of a session, durably, and ends those that are being written."""
        folder = self._folder(owner)
        with self._lock:
            self._drafts -= {draft for draft in self._drafts if draft.parent == folder}
            if folder.is_dir():
                self._files.remove_folder(folder)
                self._files.fsync_folder(self._root, Sync.CHECKPOINTS_DROPPED)

    def tidy(self) -> None:
        """Finishes what a crash cut short: drafts, and what was to be replaced, are removed.

        To be called before anything is read. Names that a killed process has made or removed may
        be in memory only, and readers are about to believe them: they are synced.
        """
        for owner in self.owners():
            folder = self._folder(owner)
            self._files.fsync_folder(folder, Sync.CHECKPOINTS_OPEN)
            found = tuple(read_folder(folder))
            self._remove(folder, sorted(set(found) - set(newest(found))))
            for entry in sorted(folder.iterdir()):
                if is_draft(entry.name):
                    self._files.unlink(entry)
            self._prune(folder)
        self._files.fsync_folder(self._root, Sync.CHECKPOINTS_OPEN)

    def _remove(self, folder: Path, found: Iterable[Checkpoint]) -> None:
        removed = False
        for one in found:
            self._files.unlink(folder / one.file)
            removed = True
        if removed:
            self._files.fsync_folder(folder, Sync.CHECKPOINT_REMOVED)

    def _prune(self, folder: Path) -> None:
        """Removes the folder of a session that has no checkpoint and no draft."""
        if folder.is_dir() and not any(folder.iterdir()):
            self._files.remove_folder(folder)

    def _folder(self, owner: bytes) -> Path:
        if len(owner) != 16:
            raise ValueError(f"the key of a session has 16 bytes, not {len(owner)}")
        return self._root / owner.hex()


def is_draft(name: str) -> bool:
    """Whether a file is left of a checkpoint that was being written."""
    return name.startswith(".") and name.endswith(DRAFT)
