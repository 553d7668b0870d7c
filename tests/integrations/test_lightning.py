"""Lightning with a remote optimizer, beside the same run with torch's AdamW."""

from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from gradpost.torch import RemoteOptimizer
from tests.integrations import pages, ranks, tiny
from tests.integrations.pages import CLOSE, Local, apart, moved

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def page(name, kind, url, batches, **models):
    lightning.seed_everything(0, verbose=False)
    code = pages.program("lightning", name, url)
    return pages.run(code, kind, loader=tiny.loader(batches), **models)


def test_the_page(url):
    local, remote = (
        page("automatic", kind, url, 40, net=tiny.network())["trainer"]
        for kind in (Local, RemoteOptimizer)
    )
    assert apart(remote.model, local.model) <= CLOSE
    assert moved(remote.model, tiny.network())
    (optimizer,) = remote.optimizers
    assert optimizer.summary.step == 20
    history = optimizer.session.history()
    assert max(row["grad_norm"] for row in history) == pytest.approx(0.5, rel=1e-5)  # clipped
    assert all(row["loss"] > 0 for row in history)  # of the closure


NORM = {"gradient_clip_val": 0.5}
VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
BF16 = {"gradient_clip_val": 0.5, "precision": "bf16-mixed"}
Unscaled = partial(RemoteOptimizer, unscale="scaler")


def module(kind, url, seed=0):
    """The page's, without dropout: Lightning saves no state of the random generator."""
    code = pages.program("lightning", "automatic", url).partition("\ntrainer")[0]
    return pages.run(code, kind)["Classifier"](tiny.network(seed, dropout=0.0))


def fit(kind, url, *, seed=0, resume=None, callbacks=(), **changed):
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=2,
        accumulate_grad_batches=4,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **changed,
    )
    trainer.fit(module(kind, url, seed), tiny.loader(40), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("changed", [NORM, VALUE, BF16], ids=["norm", "value", "bf16"])
def test_a_checkpoint_goes_on_as_if_nothing_had_been(url, changed):
    saving = ModelCheckpoint("saved", "{epoch}", save_top_k=-1)
    whole = fit(Unscaled, url, callbacks=[saving], **changed)
    resumed = fit(Unscaled, url, seed=9, resume="saved/epoch=0.ckpt", **changed)
    assert resumed.optimizers[0].session.id != whole.optimizers[0].session.id
    assert resumed.optimizers[0].summary.step == 20
    assert apart(resumed.model, whole.model) == 0
    assert moved(whole.model.net, tiny.network())


@pytest.mark.parametrize("changed", [NORM, VALUE], ids=["norm", "value"])
def test_a_checkpoint_goes_on_under_the_other_optimizer(url, changed):
    saving = ModelCheckpoint("saved", "{epoch}", save_top_k=-1)
    local = fit(Local, url, callbacks=[saving], **changed)
    away = fit(RemoteOptimizer, url, seed=9, resume="saved/epoch=0.ckpt", **changed)
    assert apart(away.model, local.model) <= CLOSE


def test_mixed_precision(url):
    """float16 with a scaler, which Lightning itself makes on a GPU only.

    Runs are further apart than in float32: a last bit decides how an activation is rounded.
    """
    scalers, ends = [], []
    for kind in (Local, Unscaled):
        scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=6))
        plugin = MixedPrecision("16-mixed", "cpu", scalers[-1])
        ends.append(fit(kind, url, plugins=[plugin], **NORM))
    local, remote = ends
    assert scalers[0].get_scale() == scalers[1].get_scale() < 2.0**22
    assert 10 < remote.optimizers[0].summary.step < 20  # the others were skipped
    assert apart(remote.model, local.model) <= 1e-3
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(RemoteOptimizer, url, **BF16)


def test_manual_optimization(url):
    local, remote = (
        page("manual", kind, url, 20, one=tiny.network(0), other=tiny.network(1))["trainer"]
        for kind in (Local, RemoteOptimizer)
    )
    assert apart(remote.model, local.model) <= CLOSE
    assert moved(remote.model.one, tiny.network(0))
    assert moved(remote.model.other, tiny.network(1))
    first, second = remote.optimizers
    assert first.session.id != second.session.id
    assert (first.summary.step, second.summary.step) == (20, 20)
    assert "loss" in second.session.history()[0]  # of its closure


def test_processes_with_a_session_each(url):
    local, remote = ranks.run("lightning", "automatic", url, "Local", "Remote")
    assert apart(remote[0], remote[1]) == 0
    assert apart(remote[0], local[0]) <= CLOSE
    assert moved(remote[0], tiny.network())
