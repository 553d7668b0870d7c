"""A model and its session: what each lets the other know."""

from collections.abc import Iterable, Sequence
from typing import Any

from gradpost.answers import Version
from gradpost.session import Session
from gradpost.torch import tensors
from gradpost.torch.groups import Groups, Held
from gradpost.torch.names import Entry


class Link:
    """Carries parameters between a model and its session.

    Attributes:
        session: On the server.
        mirror: The parameters that were written into the model last.
        dtype: In which parameters are asked for; None: the session's.

    Args:
        session: That the parameters were uploaded to, by whoever was first.
        groups: Of the model.
        master: The session's dtype.
    """

    def __init__(self, session: Session, groups: Groups, master: str) -> None:
        self.session = session
        self.mirror = tensors.Mirror()
        self.dtype = tensors.wanted(groups.entries, master)
        self._groups = groups
        self._master = master

    def describe(self) -> None:
        """Learns what the server holds for each group."""
        self._groups.describe(self.session.info())

    def pull(self) -> None:
        """Writes the newest parameters into the model."""
        arrays = self.session.pull(into=self.mirror.buffer, dtype=self.dtype)
        self.mirror.write(self._groups.entries, arrays)

    def upload(self, entries: Sequence[Entry]) -> Version:
        """Sends parameters as the model has them; a new epoch begins.

        Returns:
            The version that they are.
        """
        self.session.set_params(arrays(entries))
        assert self.session.version is not None
        self.mirror.uploaded(entries, self.session.version)
        return self.mirror.at

    def settle(self, base: Version, *, closely: bool = False) -> Version:
        """Lets the server know what has changed in the model since the last step.

        Args:
            base: The version that the model holds.
            closely: Compare all values, not only where torch has counted a change.

        Returns:
            The version that gradients count as computed from.
        """
        for late in self._groups.late():
            self.session.version = base
            self.create(self._groups.another_name(late[0].group), late)
            base = self.session.version
        edited = self.mirror.edited(self._groups.entries, closely=closely)
        return self.upload(edited) if edited else base

    def create(self, name: str, entries: Sequence[Entry]) -> Held:
        """Makes a group of new parameters on the server."""
        own = self._groups.own(entries[0].group)
        said = self.session.add_group(name, arrays(entries), **own)
        held = self._groups.added(name, entries, said)
        self.mirror.uploaded(entries, self.mirror.at)
        self.dtype = tensors.wanted(self._groups.entries, self._master)
        return held


def arrays(entries: Iterable[Entry]) -> dict[str, Any]:
    """The parameters, as a session sends them."""
    return {entry.name: tensors.to_array(entry.param) for entry in entries}
