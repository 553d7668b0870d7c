"""Checkpoints of a session: files on the server with its parameters and its whole state."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradpost.calls import path_of
from gradpost.errors import CheckpointExists, CheckpointUnknown
from gradpost.protocol import JSON, SAFETENSORS
from gradpost.transport import Answer, Part

SLICE = 1 << 20


class Checkpoint(NamedTuple):
    """A checkpoint on the server's disk.

    Attributes:
        name: Of the session's checkpoints.
        bytes: Of its file.
        digest: xxh3_128 of the file, in hex.
        made_at: Seconds since 1970.
    """

    name: str
    bytes: int
    digest: str
    made_at: float


class Checkpoints:
    """The checkpoints of one session, as `session.checkpoints`.

    Args:
        id: Of the session.
        document: Calls with JSON both ways.
        request: Calls with a reader of the answer.
        replace: Uploads once.
    """

    def __init__(
        self,
        id: str,
        document: Callable[..., dict[str, Any]],
        request: Callable[..., None],
        replace: Callable[..., None],
    ) -> None:
        self._id = id
        self._document = document
        self._request = request
        self._replace = replace

    def make(self, name: str | None = None) -> Checkpoint:
        """Saves parameters and state on the server's disk; steps wait for the copy only.

        Args:
            name: Free; None for one that tells step and version, which is made once.

        Raises:
            CheckpointExists: There is one of this name.
            DataDirMissing: The server has no folder for them.
        """
        path = path_of(self._id, "checkpoints")
        before = None if name is None else self._find(name)
        try:
            found = self._document("POST", path, {"name": name}, needs=Checkpoint._fields)
        except CheckpointExists:
            # An attempt of this call may have made it before its answer was lost.
            made = None if name is None or before is not None else self._find(name)
            if made is None:
                raise
            return made
        return _checkpoint(found)

    def list(self) -> list[Checkpoint]:
        """All of them, the oldest first."""
        path = path_of(self._id, "checkpoints")
        found = self._document("GET", path, needs=("checkpoints",))["checkpoints"]
        return [_checkpoint(one) for one in found]

    def _find(self, name: str) -> Checkpoint | None:
        return next((one for one in self.list() if one.name == name), None)

    def download(self, name: str, to: "str | os.PathLike[str]") -> Path:
        """Gets one as a safetensors file, whole or not at all.

        Its tensors are `params/<tensor>` and `<slot>/<tensor>`; `safetensors.numpy.load_file` opens
        it, and `restore` of another session takes it.

        Args:
            name: Of the checkpoint.
            to: Path of the file; one that is there is replaced.
        """
        target = Path(to)
        draft = target.with_name(f".{target.name}.part")

        def read(answer: Answer) -> None:
            with draft.open("wb") as file:
                view = memoryview(bytearray(SLICE))
                while count := answer.readinto(view):
                    file.write(view[:count])

        try:
            path = path_of(self._id, "checkpoints", name)
            self._request("GET", path, read, headers={"Accept": SAFETENSORS})
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        return target

    def delete(self, name: str) -> None:
        """Removes one; one that is gone already is no error."""
        try:
            self._document("DELETE", path_of(self._id, "checkpoints", name))
        except CheckpointUnknown:
            return

    def restore(
        self,
        name: str | None = None,
        *,
        file: "str | os.PathLike[str] | None" = None,
        scope: str = "full",
    ) -> None:
        """Goes back to a checkpoint, for all workers of the session: a new epoch begins.

        Taken once, with the same errors as `set_params`. Pull afterwards.

        Args:
            name: Of one of this session.
            file: Or a file that `download` made, perhaps of another session.
            scope: full: parameters, state and counts, to the bit. params: the moments stay.

        Raises:
            CheckpointUnknown: There is none of this name.
            TensorMismatch: It is of another model, or has no state and the scope is full.
            InvalidRequest: It is of another rule and the scope is full.
        """
        if (name is None) == (file is None):
            raise ValueError("Name a checkpoint of the session, or give a file; not both.")
        if file is not None:
            body: list[Part] = [np.memmap(file, np.uint8, "r").data]
            kind, query = SAFETENSORS, [("scope", scope)]
        else:
            body = [json.dumps({"checkpoint": name, "scope": scope}).encode()]
            kind, query = JSON, []
        self._replace("restore", body, method="POST", kind=kind, query=query)


def _checkpoint(found: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        str(found["name"]), int(found["bytes"]), str(found["digest"]), float(found["made_at"])
    )
