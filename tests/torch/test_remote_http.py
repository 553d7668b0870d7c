"""The same over HTTP: a server process, and trainers in processes of their own."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from gradpost import Session
from gradpost.torch import RemoteOptimizer
from tests.client.conftest import ROOT, serving
from tests.torch import twins


@pytest.fixture(scope="module")
def url():
    with serving("--port", "0") as line:
        yield line.rpartition(" ")[2]


@pytest.fixture
def name(url):
    name = uuid.uuid4().hex
    yield name
    Session.attach(url, name).delete()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.Tanh(), torch.nn.Linear(24, 3))


def test_a_training_run(url, name):
    theirs, ours = network(), network()
    inputs, targets = torch.randn(32, 12), torch.randint(0, 3, (32,))
    local = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    with RemoteOptimizer(ours.named_parameters(), url, name, rule="adamw", lr=1e-2) as optimizer:
        plans = [
            torch.optim.lr_scheduler.OneCycleLR(one, max_lr=0.1, total_steps=31)
            for one in (local, optimizer)
        ]
        for _ in range(30):
            for model, one, plan in zip((theirs, ours), (local, optimizer), plans, strict=True):
                one.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
                one.step()
                plan.step()
        twins.assert_close(ours.parameters(), theirs.parameters(), 1e-4)
        local.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(local.state_dict())
        optimizer.step()
        assert optimizer.summary.step == 31


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_million_parameters_with_and_without_blocking(url, name, dtype):
    theirs, ours = twins.twice((1000, 1000), (3,), dtype=torch.float32)
    for param in ours:
        param.data = param.data.to(dtype)
    local = torch.optim.SGD(theirs, lr=0.5)
    with RemoteOptimizer(ours, url, name, rule="sgd", lr=0.5) as optimizer:
        for step in range(4):
            for param, other in zip(ours, theirs, strict=True):
                param.grad = torch.full_like(param, 0.25)
                other.grad = torch.full_like(other, 0.25)
            local.step()
            optimizer.step(blocking=bool(step % 2))
        optimizer.synchronize()
        assert optimizer.summary.step == 4
    close = 3e-6 if dtype == torch.float32 else 1e-2
    twins.assert_close([param.float() for param in ours], theirs, close)


def test_processes_share_a_session(url, name):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "client" / "src"), str(ROOT)))}
    script = Path(__file__).with_name("trainer.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, url, name, str(seed), "150"],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [int(dropped) for dropped, _ in said] == [0, 0]
    with Session.attach(url, name) as session:
        assert session.info()["step"] == 300
        weight = torch.from_numpy(session.pull()["weight"])
    torch.testing.assert_close(weight, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), atol=0.1, rtol=0)
