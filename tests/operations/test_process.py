"""The process: what it prints, how it stops, what the health command says."""

import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.__main__ import main
from service.warm import combinations

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60


@contextmanager
def server(*arguments, **settings):
    """A server process that has said where it listens, and that line."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GRADPOST_")}
    env |= {"GRADPOST_WARM_RULES": "", **settings}
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve", *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def stop(process, number=signal.SIGTERM):
    """Sends the signal; returns the rest of both outputs."""
    process.send_signal(number)
    return process.communicate(timeout=PATIENCE_S)


def port_of(line):
    return int(line.rpartition(":")[2])


def healthy(*arguments):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if main(["health", *arguments]) == 0:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_prints_one_line_and_stops_with_status_0(number):
    with server("--port", "0") as (process, line):
        assert line.startswith("gradpost listens on http://127.0.0.1:")
        assert healthy("--port", str(port_of(line)))
        out, err = stop(process, number)
        assert process.returncode == 0, err
        assert out == ""
        assert "Traceback" not in err


def test_a_unix_socket_serves_and_a_stale_one_is_replaced(tmp_path):
    path = str(tmp_path / "g.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with server("--uds", path, GRADPOST_UDS_MODE="660") as (process, line):
        assert line == f"gradpost listens on unix:{path}"
        assert healthy("--uds", path)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
        with server("--uds", path) as (second, _):
            assert second.wait(PATIENCE_S) == 1
            assert "already" in second.stderr.read()
        assert healthy("--uds", path)
        stop(process)
        assert process.returncode == 0
        assert not os.path.exists(path)


def test_the_log_tells_of_start_and_stop_and_of_settings_that_are_none():
    with server("--port", "0", GRADPOST_PRT="1", GRADPOST_API_KEY="secret") as (process, line):
        assert healthy("--port", str(port_of(line)))
        _, err = stop(process)
    events = {row["event"]: row for row in map(json.loads, err.splitlines())}
    assert events["no such setting"]["variable"] == "GRADPOST_PRT"
    assert events["started"]["address"] == line.removeprefix("gradpost listens on ")
    assert events["started"]["key"] is True
    assert events["stopping"]["sessions_lost"] == 0
    assert "secret" not in err


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with server("--uds", str(path)) as (process, _):
        assert process.wait(PATIENCE_S) == 1
    assert path.read_text() == "mine"


def test_a_taken_port_is_status_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with server("--port", port) as (process, _):
            assert process.wait(PATIENCE_S) == 1
            assert "address already in use" in process.stderr.read()


def test_a_request_in_flight_ends_before_the_process_does():
    """The body's second half arrives after SIGTERM, and is answered all the same."""
    with server("--port", "0") as (process, line):
        assert healthy("--port", str(port_of(line)))
        connection = http.client.HTTPConnection("127.0.0.1", port_of(line), timeout=PATIENCE_S)
        connection.putrequest("POST", "/v1/sessions")
        connection.putheader("Content-Type", "application/json")
        body = b'{"optimizer": {"rule": "sgd"}}'
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:10])
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        connection.send(body[10:])
        answer = connection.getresponse()
        assert answer.status in (201, 503)  # done, or told so: never cut off
        answer.read()
        connection.close()
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0


def test_bad_settings_are_named_and_values_are_not_shown(monkeypatch, capsys):
    monkeypatch.setenv("GRADPOST_PORT", "70000")
    monkeypatch.setenv("GRADPOST_API_KEY", "two words")
    assert main(["serve"]) == 2
    shown = capsys.readouterr().err
    assert "GRADPOST_PORT" in shown
    assert "GRADPOST_API_KEY" in shown
    assert "two words" not in shown


def test_health_of_nobody_is_1(capsys):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert main(["health", "--port", str(port)]) == 1
    assert "no answer" in capsys.readouterr().err


def test_health_of_a_listening_address_asks_loopback(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        monkeypatch.setenv("GRADPOST_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("GRADPOST_HOST", "0.0.0.0")
    assert main(["health"]) == 1
    assert "refused" in capsys.readouterr().err


def test_a_misspelt_warm_rule_stops_the_start_and_names_the_nearest(monkeypatch, capsys):
    monkeypatch.setenv("GRADPOST_WARM_RULES", "adam,rmsprob")
    assert main(["serve"]) == 2
    shown = capsys.readouterr().err
    assert "GRADPOST_WARM_RULES" in shown
    assert "did you mean 'rmsprop'?" in shown


def test_a_stop_in_a_cold_warm_up_leaves_the_rest_uncompiled(tmp_path):
    cold = {"GRADPOST_WARM_RULES": "adam", "NUMBA_CACHE_DIR": str(tmp_path)}
    with server("--port", "0", **cold) as (process, line):
        assert line
        _, err = stop(process)
        assert process.returncode == 0, err
        assert "Traceback" not in err
    everything = 2 * len(combinations(["adam"], ["F32"]))  # each in two forms, and then the rest
    assert len(list(tmp_path.rglob("*.nbi"))) < everything


def test_warm_refuses_a_misspelt_rule(capsys):
    assert main(["warm", "adma"]) == 2
    assert "adma" in capsys.readouterr().err


def test_a_long_poll_ends_with_the_server_and_not_at_its_own_deadline():
    with server("--port", "0", GRADPOST_WARM_RULES="sgd") as (process, line):
        port = port_of(line)
        assert healthy("--port", str(port))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        spec = b'{"optimizer": {"rule": "sgd"}, "params": {"w": [1.0]}}'
        connection.request("PUT", "/v1/sessions/m", spec, {"Content-Type": "application/json"})
        assert connection.getresponse().read()
        connection.request(
            "GET", "/v1/sessions/m/params?min_version=99", headers={"Prefer": "wait=55"}
        )
        time.sleep(0.5)  # it waits by now, or the stop finds it before: both must end
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        answer = connection.getresponse()
        assert answer.status == 503
        assert b"shutting-down" in answer.read()
        assert process.wait(PATIENCE_S) == 0
        assert time.monotonic() - began < 20
