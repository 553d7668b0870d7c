"""Accelerate with a remote optimizer, beside the same run with torch's AdamW."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState

from gradpost.torch import RemoteOptimizer
from tests.integrations import pages, ranks, tiny
from tests.integrations.pages import CLOSE, Local, apart, moved


def started(**options):
    """An accelerator as after a start of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(gradient_accumulation_steps=2, **options)


def prepared(kind, url, seed=0, **options):
    """It, a model, an optimizer, a loader and a scheduler."""
    accelerator = started(**options)
    model = tiny.network(seed)
    optimizer = kind(model, url, rule="adamw", lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    return accelerator, *accelerator.prepare(model, optimizer, tiny.loader(40), scheduler)


def train(accelerator, model, optimizer, loader, scheduler, batches):
    for at, (inputs, targets) in enumerate(loader):
        if at in batches:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


def test_the_page(url):
    code = pages.program("accelerate", "loop", url)
    local, remote = (
        pages.run(code, kind, model=tiny.network(), loader=tiny.loader(40))
        for kind in (Local, RemoteOptimizer)
    )
    assert apart(remote["model"], local["model"]) <= CLOSE
    assert moved(remote["model"], tiny.network())
    optimizer = remote["optimizer"].optimizer
    assert optimizer.summary.step == 20
    history = optimizer.session.history()
    assert max(row["grad_norm"] for row in history) == pytest.approx(0.5, rel=1e-5)  # clipped
    assert optimizer.summary.epoch == 1  # prepare has loaded what the server had


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}], ids=["fp32", "bf16"])
def test_a_saved_state_goes_on_as_if_nothing_had_been(url, options):
    run = prepared(RemoteOptimizer, url, **options)
    train(*run, batches=range(20))
    run[0].save_state("state")
    train(*run, batches=range(20, 40))
    whole = run[1]
    run = prepared(RemoteOptimizer, url, seed=9, **options)
    run[0].load_state("state")
    train(*run, batches=range(20, 40))
    assert run[2].optimizer.summary.step == 20
    assert apart(run[1], whole) == 0
    assert moved(whole, tiny.network())


@pytest.mark.parametrize("kinds", [(Local, RemoteOptimizer), (RemoteOptimizer, Local)])
def test_a_saved_state_goes_on_under_the_other_optimizer(url, kinds):
    ends = []
    for before, after in ((Local, Local), kinds):
        run = prepared(before, url)
        train(*run, batches=range(20))
        run[0].save_state("state")
        run = prepared(after, url, seed=9)
        run[0].load_state("state")
        train(*run, batches=range(20, 40))
        ends.append(run[1])
    assert apart(ends[1], ends[0]) <= CLOSE


def test_a_saved_state_takes_the_session_back(url):
    run = prepared(RemoteOptimizer, url)
    train(*run, batches=range(20))
    run[0].save_state("state")
    ends = []
    for _ in range(2):
        train(*run, batches=range(20, 40))
        ends.append({name: value.clone() for name, value in run[1].state_dict().items()})
        assert run[2].optimizer.summary.step == 20
        run[0].load_state("state")
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=0)


def test_without_device_placement_nothing_is_loaded(url, monkeypatch):
    optimizer = RemoteOptimizer(tiny.network(), url, rule="adamw")
    monkeypatch.setattr(optimizer, "load_state_dict", None)
    assert started(device_placement=False).prepare(optimizer).optimizer is optimizer


@pytest.mark.parametrize(
    ("kind", "options", "seen"),
    [
        (Local, {}, True),
        (Local, {"fused": True}, False),
        (RemoteOptimizer, {}, False),
        (RemoteOptimizer, {"unscale": "scaler"}, True),
    ],
)
def test_a_step_that_the_scaler_skips(url, kind, options, seen):
    """Accelerate takes no fp16 on a CPU; so its wrapper alone."""
    started()
    model = tiny.network()
    inner = kind(model, url, rule="adamw", lr=1e-2, **options)
    optimizer = AcceleratedOptimizer(inner, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        loss = factor * model(tiny.samples(8)[0]).square().sum()
        optimizer.scaler.scale(loss).backward()
        optimizer.step()
        assert optimizer.step_was_skipped is (seen and factor != 1.0)
        assert moved(model, tiny.network()) is (factor == 1.0)
    assert optimizer.scaler.get_scale() == 4.0


def test_processes_with_a_session_each(url):
    local, remote = ranks.run("accelerate", "loop", url, "Local", "Remote")
    assert apart(remote[0], remote[1]) == 0
    assert apart(remote[0], local[0]) <= CLOSE
    assert moved(remote[0], tiny.network())
