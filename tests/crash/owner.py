"""Trainers who own a session: they create, change and end it, beside training like all others."""

from tests.crash.door import rest
from tests.crash.history import Life, Patch, Upload
from tests.crash.workload import AGAIN, Known, Worker


class Owner(Worker):
    """One trainer with a session of its own.

    Args:
        model: The session.
        durability: That it is created with.
        others: As for `Worker`.
    """

    def __init__(self, model, durability, *others):
        super().__init__(*others)
        self._mine = model
        self._durability = durability
        self._marks = 0
        self._created = False

    def act(self):
        dice = self.rng.random()
        if not self._created:
            self.create()
        elif dice > 0.15:
            super().act()
        elif self._mine.ends:
            self.delete()
        elif dice < 0.06:
            self.upload()
        else:
            self.patch()

    def finish(self):
        """The session is there at the end."""
        if not self._created:
            self.create()

    def create(self):
        """Makes the session, in one call or in two."""
        model, path = self._mine, f"/v1/sessions/{self._mine.name}"
        self._marks += 1
        spec = {**model.spec, "durability": self._durability}
        inline = {"params": model.inline(self._marks)} if model.ends and self._marks % 2 else {}
        began, returned, answer = self.settled("PUT", path, {**spec, **inline})
        assert answer.status in (200, 201), answer
        told = answer.json
        if told["status"] == "empty":
            body = model.upload(self._marks)
            _, returned, answer = self.settled(
                "PUT", f"{path}/params", body.data, content_type=body.content_type,
                if_none_match="*",
            )  # fmt: skip
            assert answer.status == 200 or answer.slug == "precondition-failed", answer
        self.history.add(
            Life(model.name, told["incarnation"], began, returned, True, told["epoch"], self._marks)
        )
        self.known[model.name] = Known()
        self.known[model.name].incarnation = told["incarnation"]
        self._created = True

    def delete(self):
        """Ends the session."""
        name = self._mine.name
        incarnation = self.known[name].incarnation
        invoked, returned, answer = self.settled("DELETE", f"/v1/sessions/{name}")
        assert answer.status == 204 or answer.slug == "session-gone", answer
        self.history.add(Life(name, incarnation, invoked, returned, False))
        self._created = False

    def patch(self):
        """Sets another learning rate, one that nobody has set before."""
        name, lr = self._mine.name, self._mine.lr * (0.5 + self.rng.random())
        incarnation = self.known[name].incarnation
        while True:
            invoked, returned, answer = self.once(
                "PATCH", f"/v1/sessions/{name}", {"optimizer": {"lr": lr}}
            )
            status = None if answer is None else answer.status
            self.history.add(Patch(name, incarnation, invoked, returned, lr, status))
            if answer is None:
                continue
            if answer.slug not in AGAIN:
                assert answer.status == 200, answer
                return
            rest()

    def upload(self):
        """Replaces the parameters, if the session is where it was seen last."""
        model, known = self._mine, self.known[self._mine.name]
        if known.at is None:
            return
        self._marks += 1
        epoch, version = known.at
        whole = self.rng.random() < 0.7
        tag, condition = (
            (f'"epoch-{epoch}"', (epoch, None)) if whole
            else (f'"{epoch}-{version}"', (epoch, version))
        )  # fmt: skip
        body = model.upload(self._marks)
        invoked, returned, answer = self.settled(
            "PUT", f"/v1/sessions/{model.name}/params", body.data,
            content_type=body.content_type, if_match=tag,
        )  # fmt: skip
        assert answer.status == 200 or answer.slug == "precondition-failed", answer
        now = answer.json["epoch"]  # nobody else uploads: a later epoch is ours
        self.history.add(
            Upload(
                model.name, known.incarnation, invoked, returned, condition, self._marks,
                now if now != epoch else None,
            )
        )  # fmt: skip
        known.at = None
