"""What can go wrong in the storage, as one tree.

```
Exception
├── StorageFailure   the process must exit and recover: nobody knows what the disk holds
├── NoSpace          the disk is full: what was asked for did not happen, all else stands
├── Refused          what was asked of a folder is not done: held, newer, damaged, or it exists
├── CopyFailed       a backup could not be made; the data folder is as it was
├── Overtaken        a checkpoint was written for a session whose checkpoints were dropped meanwhile
└── Damaged          one session can't be recovered; caught per session, reported as `Damage`
```

Reading errors stay `OSError` until recovery turns them into damage.
"""

from typing import NamedTuple


class StorageFailure(Exception):
    """A write or a sync failed: the caller ends the process, and recovery finds out what holds.

    It ends by `os._exit`: closing the index in order would write again. After a failed fsync the
    kernel may have dropped the pages and marked them clean; a second fsync would succeed and mean
    nothing.
    """


class NoSpace(Exception):
    """The disk is full, and nothing of what was asked for has happened."""


class Refused(Exception):
    """A folder is not opened, or not made; the message is a sentence: why, and what to do."""


class CopyFailed(Exception):
    """A backup could not be made, nothing is left of it, and the data folder is as it was.

    Never a `StorageFailure`: that another disk fails is no reason to end a server.
    """


class Overtaken(Exception):
    """A checkpoint is not there: all of its session's were dropped while it was written."""


class Damaged(Exception):
    """Acknowledged records of one session are missing or unreadable.

    Args:
        what: What is wrong, in words.
        where: The file, slot or row.
    """

    def __init__(self, what: str, where: str) -> None:
        super().__init__(what, where)
        self.what = what
        self.where = where


class Damage(NamedTuple):
    """A session that recovery refuses and does not touch."""

    session: str
    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.session}: {self.what} ({self.where})"
