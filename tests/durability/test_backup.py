"""Backups of servers that run, and what a server makes of one."""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

from tests.api.conftest import PARAMS, check_problem
from tests.durability.test_recovery import make, push_some

ROOT = Path(__file__).resolve().parents[2]


def test_a_backup_of_a_running_server_is_a_data_folder(start):
    server = start()
    make(server)
    make(server, "sgd", "slow", "snapshot")
    push_some(server, 7)
    assert server.call("POST", "/v1/sessions/m/checkpoints", {"name": "c"}).status == 201
    kept = server.state_of()
    reply = server.call("POST", "/v1/server/backup", {"name": "one"})
    assert reply.status == 201, reply
    found = reply.json
    assert (found["sessions"], found["checkpoints"], found["damaged"]) == (2, 1, [])
    assert found["folder"] == str(server.folder.resolve().with_name("data-backups") / "one")
    push_some(server, 2, 8)  # the server goes on
    check_problem(server.call("POST", "/v1/server/backup", {"name": "one"}), 409, "backup-refused")
    for name in ("../x", 5):
        reply = server.call("POST", "/v1/server/backup", {"name": name})
        check_problem(reply, 422, "invalid-request")
    again = start("data-backups/one")
    restored = again.state_of()
    assert restored["at"].step == kept["at"].step
    assert restored["at"].epoch == 2  # time was turned back, and the workers are told
    for what in ("params", "state", "runs", "ledger", "incarnation"):
        assert restored[what] == kept[what], what
    assert [one["name"] for one in checkpoints_of(again)] == ["c"]
    reply = again.push(worker="v", sequence=9, base_version="1-9")
    check_problem(reply, 409, "epoch-changed")
    assert again.push(worker="v", sequence=7, base_version="1-1").status == 422  # other bytes
    push_some(again, 1, 8)


def checkpoints_of(server):
    return server.call("GET", "/v1/sessions/m/checkpoints").json["checkpoints"]


def test_a_backup_under_load_is_of_one_moment(start):
    server = start()
    make(server)
    stop, steps = threading.Event(), []

    def train():
        sequence = 0
        while not stop.is_set():
            sequence += 1
            reply = server.push(worker="w", sequence=sequence, base_version=1)
            if reply.status == 200:
                steps.append(reply.json["step"])

    thread = threading.Thread(target=train)
    thread.start()
    try:
        while len(steps) < 20:
            pass
        before = len(steps)
        assert server.call("POST", "/v1/server/backup", {"name": "one"}).status == 201
        after = len(steps) + 1
    finally:
        stop.set()
        thread.join()
    again = start("data-backups/one")
    step = again.state_of()["at"].step
    assert before <= step <= after
    ranges = again.call("GET", "/v1/sessions/m/workers/w").json["ranges"]
    assert ranges == [[1, step]]


def test_without_a_folder_there_is_nothing_to_back_up(api_without_folder):
    reply = api_without_folder.call("POST", "/v1/server/backup")
    check_problem(reply, 409, "data-dir-missing")


def test_the_command_asks_the_server_that_holds_the_folder(scratch):
    data, copy = scratch / "data", scratch / "copy"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRADPOST_")}
    environment |= {
        "GRADPOST_DATA_DIR": str(data), "GRADPOST_API_KEY": "a-key", "GRADPOST_WARM_RULES": "",
        "GRADPOST_PORT": "0", "GRADPOST_LOG_LEVEL": "error",
    }  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-m", "service", "serve"], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        address = server.stdout.readline().split()[-1]
        body = {"optimizer": {"rule": "adam"}, "durability": "log", "params": PARAMS}
        request = urllib.request.Request(
            f"{address}/v1/sessions/m", json.dumps(body).encode(), method="PUT",
            headers={"Content-Type": "application/json", "Authorization": "Bearer a-key"},
        )  # fmt: skip
        assert urllib.request.urlopen(request, timeout=60).status == 201
        environment["GRADPOST_PORT"] = address.rpartition(":")[2]

        def backup(to, **changes):
            return subprocess.run(
                [sys.executable, "-m", "service", "backup", "--to", str(to)], cwd=ROOT,
                env={**environment, **changes}, capture_output=True, text=True, timeout=100,
            )  # fmt: skip

        done = backup(copy)
        assert done.returncode == 0, done
        assert "1 sessions" in done.stdout
        assert backup(copy).returncode == 2  # it exists
        refused = backup(scratch / "other", GRADPOST_API_KEY="wrong")
        assert refused.returncode == 2
        assert "wrong" not in refused.stderr
        silent = backup(scratch / "other", GRADPOST_PORT="1")
        assert silent.returncode == 2
        assert "held by a server" in silent.stderr
    finally:
        server.terminate()
        assert server.wait(60) == 0
        server.stdout.close()
    check = subprocess.run(
        [sys.executable, "-m", "service", "check", "--data-dir", str(copy)], cwd=ROOT,
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert check.returncode == 0, check
    assert "m: snapshot of record 1" in check.stdout


def test_what_is_only_in_memory_is_saved_first_or_said_to_be_left_out(start):
    server = start()
    make(server, durability="snapshot")
    make(server, name="n", durability="none")
    push_some(server, 3)
    found = server.call("POST", "/v1/server/backup", {"name": "one"}).json
    assert (found["sessions"], found["left_out"]) == (1, 1)
    again = start("data-backups/one")
    assert again.state_of()["at"].step == 3
    assert again.state_of()["params"] == server.state_of()["params"]
