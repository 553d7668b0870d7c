"""The groups of an optimizer beside those of the server: who is in them, and what each holds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gradpost.torch import names, rules
from gradpost.torch.names import Entry

ParamGroups = Sequence[Mapping[str, Any]]


class Held(NamedTuple):
    """A group of the server."""

    name: str
    group: int
    """The place in `param_groups` of the group it belongs to."""
    hyper: Mapping[str, Any]
    """What the server holds for it, as it described it last."""
    replaceable: Mapping[str, Any]
    """Of that, what a push may replace."""


def _held(name: str, group: int, hyper: Mapping[str, Any]) -> Held:
    return Held(name, group, hyper, rules.comparable(hyper))


class Groups:
    """Which parameters the server keeps, in which of its groups.

    Group 0 is the server's default group, the others are named ones. What begins to require
    gradients later comes to a further group of the server, with the hyperparameters of its own.

    Attributes:
        entries: The parameters that the server keeps.
        idle: Those that required no gradient when they came.
        held: The server's groups; empty until the server has described the session.
        stated: For each group, the hyperparameters that it was created with.

    Args:
        rule: Of the groups that state none.
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.entries: list[Entry] = []
        self.idle: list[Entry] = []
        self.held: list[Held] = []
        self.stated: list[dict[str, Any]] = []
        self._called: list[str] = []
        self._given: list[dict[torch.Tensor, str]] = []  # names, of each group

    def rule_of(self, group: Mapping[str, Any]) -> str:
        """The rule of one of `param_groups`."""
        return str(group.get("rule", self.rule))

    def rules(self, groups: ParamGroups) -> list[str]:
        """The rules of all."""
        return [self.rule_of(group) for group in groups]

    def take_in(self, groups: ParamGroups, index: int, known: Mapping[str, Any]) -> list[Entry]:
        """Names a group and its parameters.

        Args:
            groups: `param_groups`.
            index: Of the new group, the last that was not taken in.
            known: The defaults of its rule.

        Returns:
            Those of its parameters that require gradients.

        Raises:
            ValueError: A parameter that no session can hold, or its rule can't take.
        """
        group = groups[index]
        called = names.group_name(group, index, self._called)
        start = sum(len(before["params"]) for before in groups[:index])
        others = {param: name for given in self._given for param, name in given.items()}
        given = names.name_params(group, called, start, others)
        self._given.append(given)
        self._called.append(called)
        self.stated.append(rules.stated(self.rule_of(group), group, known))
        found = [Entry(param, name, index) for param, name in given.items()]
        for entry in found:
            rules.check_shape(self.rule_of(group), entry.name, tuple(entry.param.shape))
        self.idle += [entry for entry in found if not entry.param.requires_grad]
        return [entry for entry in found if entry.param.requires_grad]

    def forget(self, index: int) -> None:
        """Takes back a group that the server did not take in."""
        del self._given[index:], self._called[index:], self.stated[index:]
        self.idle = [entry for entry in self.idle if entry.group < index]

    def spec(self) -> list[dict[str, Any]]:
        """The groups beside the default one, as a session is created with them."""
        members: dict[int, list[str]] = {}
        for entry in self.entries:
            members.setdefault(entry.group, []).append(entry.name)
        return [
            {"name": self._called[index], "params": own, **self.own(index)}
            for index, own in members.items()
            if index
        ]

    def own(self, index: int) -> dict[str, Any]:
        """What a group states beside the session's optimizer."""
        return rules.differences(self.stated[index], self.stated[0])

    def describe(self, said: Mapping[str, Any]) -> None:
        """Takes what the server holds, out of its description of the session."""
        hyper = {group["name"]: group for group in said["groups"]}
        hyper[names.DEFAULT] = said["optimizer"]
        if not self.held:
            filled = dict.fromkeys(entry.group for entry in self.entries)
            self.held = [_held(self._called[index], index, {}) for index in filled]
        self.held = [
            _held(one.name, one.group, hyper.get(one.name, one.hyper)) for one in self.held
        ]

    def hyper(self) -> dict[int, Mapping[str, Any]]:
        """What the server holds for each group."""
        return {held.group: held.hyper for held in self.held}

    def another_name(self, index: int) -> str:
        """The name of a further group of the server for one of `param_groups`."""
        so_far = sum(held.group == index for held in self.held)
        called = self._called[index]
        return f"{called}-late-{so_far}" if so_far or not index else called

    def added(self, name: str, entries: Sequence[Entry], said: Mapping[str, Any]) -> Held:
        """Takes note of a group that the server has added."""
        hyper = next(group for group in said["groups"] if group["name"] == name)
        held = _held(name, entries[0].group, hyper)
        self.held.append(held)
        self.entries += entries
        joined = {entry.name for entry in entries}
        self.idle = [entry for entry in self.idle if entry.name not in joined]
        return held

    def late(self) -> list[list[Entry]]:
        """By group, the idle parameters that have a gradient now."""
        found: dict[int, list[Entry]] = {}
        for entry in self.idle:
            if entry.param.grad is not None:
                found.setdefault(entry.group, []).append(entry)
        return list(found.values())

    def overrides(self, groups: ParamGroups) -> dict[str, dict[str, Any]]:
        """By group of the server, what `param_groups` has and the server has not."""
        found = {}
        for held in self.held:
            changed = rules.overrides(groups[held.group], held.replaceable)
            if changed:
                found[held.name] = changed
        return found
