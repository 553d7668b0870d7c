"""A disk that forgets: what the calls of the storage leave behind a crash, and calls that record.

Strict POSIX: a write counts only once its file was synced, a name only once its folder was. Until
then each 512-byte sector and each change of a name may or may not have reached the disk, in any
order. The database is one value whose commits reach the disk in order, as SQLite promises.
"""

import contextlib
import os
from enum import StrEnum

from service.storage.files import Calls

SECTOR = 512


class Mode(StrEnum):
    """How the machine stops."""

    KILL = "the process is killed; the kernel still has everything"
    LOSE = "power is lost with everything that was not synced"
    KEEP = "power is lost after everything was written"
    TEAR = "power is lost with every second sector"
    SKIP = "power is lost with every second write"


POWER = [mode for mode in Mode if mode is not Mode.KILL]


class Crash(BaseException):
    """The process is gone."""


class File:
    def __init__(self, durable=b""):
        self.durable = bytes(durable)
        self.now = bytearray(durable)
        self.pending = []

    def write(self, offset, data):
        self.pending.append((offset, bytes(data)))
        _put(self.now, offset, data)

    def resize(self, size):
        self.pending.append((size, None))
        _resize(self.now, size)

    def sync(self):
        self.durable = bytes(self.now)
        self.pending = []

    def after(self, mode, rng):
        if mode is Mode.KILL:
            found = File(self.durable)
            found.now, found.pending = bytearray(self.now), list(self.pending)
            return found
        if mode is Mode.KEEP:
            return File(self.now)
        content = bytearray(self.durable)
        for offset, data in self.pending if mode is not Mode.LOSE else ():
            whole = rng.random() < 0.5
            if data is None:
                if whole:
                    _resize(content, offset)
            elif mode is Mode.SKIP:
                if whole:
                    _put(content, offset, data)
            else:
                for begin, part in _sectors(offset, data):
                    if rng.random() < 0.5:
                        _put(content, begin, part)
        return File(content)

    def build(self, path):
        write(path, self.now)


class Database:
    def __init__(self):
        self.durable = self.now = b""
        self.pending = []

    def commit(self, content):
        self.now = content
        self.pending.append(content)

    def sync(self):
        self.durable, self.pending = self.now, []

    def after(self, mode, rng):
        found = Database()
        if mode is Mode.KILL:
            found.durable, found.now, found.pending = self.durable, self.now, list(self.pending)
        else:
            which = {Mode.LOSE: [self.durable], Mode.KEEP: [self.now]}
            found.durable = rng.choice(which.get(mode, [self.durable, *self.pending]))
            found.now = found.durable
        return found

    def build(self, path):
        write(path, self.now)


class Folder:
    def __init__(self):
        self.durable, self.now, self.pending = {}, {}, []

    def change(self, **changes):
        """Names that appear (a node) or disappear (None), at once."""
        self.pending.append(changes)
        _apply(self.now, changes)

    def sync(self):
        self.durable, self.pending = dict(self.now), []

    def after(self, mode, rng, known=None):
        """What is there after a crash; a node that has two names stays one node."""
        known = {} if known is None else known

        def moved(node):
            if node is None:
                return None
            if id(node) not in known:
                extra = (known,) if isinstance(node, Folder) else ()
                known[id(node)] = node.after(mode, rng, *extra)
            return known[id(node)]

        found = Folder()
        names = dict(self.durable)
        if mode is Mode.KILL:
            found.pending = [
                {name: moved(node) for name, node in changes.items()} for changes in self.pending
            ]
            found.now = {name: moved(node) for name, node in self.now.items()}
        else:
            for changes in self.pending if mode is not Mode.LOSE else ():
                if mode is Mode.KEEP or rng.random() < 0.5:
                    _apply(names, changes)
        found.durable = {name: moved(node) for name, node in names.items()}
        if mode is not Mode.KILL:
            found.now = dict(found.durable)
        return found

    def build(self, path):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        for age, (name, node) in enumerate(self.now.items()):
            entry = f"{path}/{name}"  # a Path for each would be a third of the time
            node.build(entry)
            os.utime(entry, (age, age))  # what came later is newer


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


def _put(content, offset, data):
    if len(content) < offset:
        _resize(content, offset)
    content[offset : offset + len(data)] = data


def _resize(content, size):
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


def _sectors(offset, data):
    at = 0
    while at < len(data):
        size = min(SECTOR - (offset + at) % SECTOR, len(data) - at)
        yield offset + at, data[at : at + size]
        at += size


def _apply(names, changes):
    for name, node in changes.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Recording(Calls):
    """Real calls in a scratch folder, mirrored on a disk that can crash.

    Args:
        root: Folder that stands for the disk's root.
        disk: What it holds.
        without: Syncs that do nothing.
        after: Called after every step; None: nothing.
    """

    def __init__(self, root, disk, without=(), after=None):
        self.root, self.disk = root, disk
        self.without = frozenset(without)
        self.after = after
        self.left = None
        """Steps until the process is killed; None: for ever."""
        self.dead = False
        self.synced = set()
        self._files = {}
        self._databases = {}

    def find(self, path):
        node, root = self.disk, os.fspath(self.root)
        assert os.fspath(path).startswith(root)
        for name in os.fspath(path)[len(root) + 1 :].split("/"):
            node = node.now[name] if name else node
        return node

    def step(self):
        if self.dead:
            raise Crash
        if self.after is not None:
            self.after()
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.dead = True
                raise Crash

    def abandon(self):
        """What the kernel does with the files of a process that is gone."""
        for fd in list(self._files):
            os.close(fd)
        self._files = {}
        for connection in self._databases:
            connection.close()

    def sync(self, site, node):
        self.step()
        if site not in self.without:
            node.sync()
            self.synced.add(site)

    # The calls

    def open(self, path, flags):
        self.step()
        fd = super().open(path, flags)
        names = self.find(path.parent)
        if path.name not in names.now:
            names.change(**{path.name: File()})
        self._files[fd] = names.now[path.name]
        return fd

    def close(self, fd):
        if self._files.pop(fd, None) is not None:
            super().close(fd)

    def pwrite(self, fd, data, offset):
        self.step()
        self._files[fd].write(offset, data)
        return super().pwrite(fd, data, offset)

    def allocate(self, fd, size):
        self.step()
        super().allocate(fd, size)
        if size > len(self._files[fd].now):
            self._files[fd].resize(size)

    def truncate(self, fd, size):
        self.step()
        super().truncate(fd, size)
        self._files[fd].resize(size)

    def stamp(self, fd, time_ns):
        self.step()
        super().stamp(fd, time_ns)

    def fdatasync(self, fd, site):
        self.sync(site, self._files[fd])

    def fsync(self, fd, site):
        self.sync(site, self._files[fd])

    def fsync_folder(self, path, site):
        self.sync(site, self.find(path))

    def rename(self, source, target):
        self.step()
        old, new = self.find(source.parent), self.find(target.parent)
        super().rename(source, target)
        node = old.now[source.name]
        if old is new:
            old.change(**{source.name: None, target.name: node})
        else:
            new.change(**{target.name: node})
            old.change(**{source.name: None})

    def unlink(self, path):
        self.step()
        super().unlink(path)
        self.find(path.parent).change(**{path.name: None})

    def mkdir(self, path):
        self.step()
        super().mkdir(path)
        self.find(path.parent).change(**{path.name: Folder()})

    def rmdir(self, path):
        self.step()
        super().rmdir(path)
        self.find(path.parent).change(**{path.name: None})

    def connect(self, path):
        self.step()
        names = self.find(path.parent)
        if path.name not in names.now:
            names.change(**{path.name: Database()})
        connection = super().connect(path)
        self._databases[connection] = names.now[path.name]
        return connection

    def commit(self, connection, site):
        self.step()
        super().commit(connection, site)
        node = self._databases[connection]
        node.commit(connection.serialize())
        self.sync(site, node)

    def checkpoint(self, connection, site):
        super().checkpoint(connection, site)
        self.sync(site, self._databases[connection])
