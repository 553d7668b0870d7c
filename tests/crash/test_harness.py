"""The harness itself: it finds what a server loses, and a reader who was shown other bits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.campaign import ROUNDS, Campaign
from tests.crash.faults import FAULTS
from tests.crash.fleet import ROOT
from tests.crash.history import History, Pull, Push
from tests.crash.models import MODELS
from tests.crash.plan import Plan
from tests.crash.points import Points, kind_of
from tests.crash.violation import BITS, LOST


def test_a_disk_that_forgets_records_is_found_out(fleet, plan, scratch):
    """The server can't know that its last records are gone; the history does."""
    with Campaign(fleet, scratch / "data", plan, seed=2, forget=30) as campaign:
        campaign.kill("run:answer.steps.after:60")
        campaign.kill("run:answer.steps.after:60")
        campaign.stop(0.1)
        report = campaign.report()
    assert not campaign.violations, "told by the server itself"
    assert {"gaps", "keys", "standings"} & {one.check for one in report.violations}
    assert {one.column for one in report.violations} >= {LOST}


FOUND_BY = {
    "drop": {"fates", "members", "sightings", "standings"},
    "twice": {"numbers", "looks"},
    "both": {"fates", "members"},
    "heavier": {"bits"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_breaks_a_round_is_found_out(fleet, reference, scratch, fault):
    plan = Plan(seed=1)
    with Campaign(fleet, scratch / "data", plan, 4, ROUNDS, wait_cap=2, fault=fault) as campaign:
        campaign.stop(0.7)
        for _ in range(4 if fault == "drop" else 1):
            campaign.kill("run:fdatasync.RING_COMMIT-contribution.after:12")
        campaign.stop(0.3)
        found = campaign.report(reference if fault == "heavier" else None).violations
    assert not campaign.violations, "told by the server itself"
    assert {one.check for one in found} & FOUND_BY[fault], found


def test_other_bits_than_those_of_a_replay_are_found(fleet, reference, plan, scratch):
    with Campaign(fleet, scratch / "data", plan, seed=3) as campaign:
        campaign.stop(0.5)
        assert not campaign.finish(reference).violations
    seen = next(p for p in campaign.history.of(Pull) if p.digest)
    done = next(p for p in campaign.history.of(Push) if p.status == 200)
    lies = {
        id(seen): seen._replace(digest="0"),
        id(done): done._replace(summary=done.summary | {"grad_norm": 0.125}),
    }
    history = History()
    for event in campaign.history.events:
        history.add(lies.get(id(event), event))
    models = {model.name: model for model in MODELS}
    found = reference.check(history, models)
    assert {violation.column for violation in found} == {BITS}
    assert {violation.at for violation in found} == {seen.returned, done.returned}


def test_a_victim_of_its_own_process_says_where_it_is_and_where_it_died(scratch):
    command = [
        sys.executable, "-m", "tests.crash.victim", "--data-dir", scratch / "data", "--port", "0",
        "--kill", "stop:open.spare.before:99", "--counts", scratch / "counts",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline().startswith("gradpost listens on http://127.0.0.1:")
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    told = json.loads((scratch / "counts").read_text())
    assert told["killed"] is None
    assert told["passed"]["start:rename.FORMAT.after"] == 1
    command[command.index("--kill") + 1] = "start:pwrite.LOCK.torn:1"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert json.loads((scratch / "counts").read_text())["killed"] == "start:pwrite.LOCK.torn"


def test_points_count_by_phase_and_kill_at_one_passing(tmp_path, monkeypatch):
    dead = []
    monkeypatch.setattr(os, "kill", lambda pid, number: dead.append(number))
    monkeypatch.setattr("threading.Event.wait", lambda self: None)
    points = Points("run:a.before:2", tmp_path / "counts")
    points.at("a.before")
    points.phase = lambda: "run"
    points.at("a.before")
    assert not dead
    points.at("a.before", lambda: dead.append("last words"))
    assert dead == ["last words", signal.SIGKILL]
    told = json.loads((tmp_path / "counts").read_text())
    assert told == {
        "killed": "run:a.before", "passed": {"start:a.before": 1, "run:a.before": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("", "data"),
        ("LOCK", "LOCK"),
        ("FORMAT.tmp", "FORMAT"),
        ("index.db", "index"),
        ("ballast", "ballast"),
        ("sessions", "sessions"),
        ("sessions/0a1b", "session"),
        ("sessions/0a1b.creating", "creating"),
        ("sessions/0a1b.creating/ring-0", "ring"),
        ("sessions/0a1b/snap-3", "snap"),
        ("sessions/0a1b/spare", "spare"),
        ("orphans/0a1b", "orphans-1"),
        ("checkpoints/0a1b", "checkpoints-1"),
        ("checkpoints/0a1b/.3.tmp", "checkpoints-draft"),
        ("checkpoints/0a1b/best.0f.safetensors", "checkpoints-2"),
        ("../elsewhere", "data"),
    ],
)
def test_files_have_kinds(tmp_path, path, kind):
    root = tmp_path / "any-name.7"
    assert kind_of(root, Path(os.path.normpath(root / path))) == kind


def test_a_plan_prefers_what_was_never_killed_and_prepares_what_needs_it():
    plan = Plan(seed=1)
    plan.done(None, None, {"start:first": 1, "run:a": 9}, before=None, virgin=True)
    assert plan.first == ["start:first"]
    plan.done("run:a:1", "run:a", {"start:first": 1, "run:a": 1}, before=None, virgin=False)
    passed = {"start:first": 1, "start:left": 1, "run:a": 2}
    plan.done("run:a:2", "run:a", passed, before="run:a:1", virgin=False)
    assert plan.missing == ["start:first", "start:left"]
    orders = [plan.next() for _ in range(60)]
    wanted = [order for order in orders if not order.startswith("random:")]
    assert "start:left:1" in wanted
    assert {wanted[at - 1] for at, one in enumerate(wanted) if one == "start:left:1"} == {"run:a:1"}
