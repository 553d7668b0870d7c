"""Hugging Face's Trainer with a remote optimizer, beside the same run with torch's AdamW."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gradpost.torch import RemoteOptimizer
from tests.integrations import pages
from tests.integrations.pages import CLOSE, Local, apart, moved

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
WORDS = 61


def language_model():
    """Two layers and tied embeddings."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def sentences():
    """Words in arithmetic progressions, which can be learnt."""
    made = torch.Generator().manual_seed(1)
    starts = torch.randint(0, WORDS, (160, 1), generator=made)
    steps = torch.randint(1, 4, (160, 1), generator=made)
    rows = (starts + steps * torch.arange(12)) % WORDS
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(out, **changed):
    return TrainingArguments(
        out,
        use_cpu=True,
        disable_tqdm=True,
        max_steps=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        lr_scheduler_type="linear",
        warmup_steps=5,
        max_grad_norm=0.5,
        weight_decay=0.1,
        save_steps=10,
        dataloader_pin_memory=False,
        **changed,
    )


def train(kind, url, out, *, resume=None, callbacks=None, id=None, **changed):
    """Trains a new model; returns its Trainer."""
    trainer = Trainer(
        language_model(),
        arguments(out, **changed),
        train_dataset=sentences(),
        optimizer_cls_and_kwargs=(kind, {"url": url, "id": id, "rule": "adamw", "lr": 5e-3}),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("changed", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_a_checkpoint_goes_on_as_if_nothing_had_been(url, changed):
    whole = train(RemoteOptimizer, url, "whole", **changed)
    checkpoint = Path("whole/checkpoint-10")
    assert (checkpoint / "optimizer.pt").exists()
    resumed = train(RemoteOptimizer, url, "resumed", resume=str(checkpoint), **changed)
    assert resumed.optimizer.optimizer.session.id != whole.optimizer.optimizer.session.id
    assert resumed.optimizer.optimizer.summary.step == 20
    assert apart(resumed.model, whole.model) == 0
    assert moved(whole.model, language_model())


def test_a_checkpoint_goes_on_under_the_other_optimizer(url):
    local, remote = train(Local, url, "local"), train(RemoteOptimizer, url, "remote")
    ours = torch.load("remote/checkpoint-10/optimizer.pt", weights_only=True)
    theirs = torch.load("local/checkpoint-10/optimizer.pt", weights_only=True)
    assert ours["param_groups"] == theirs["param_groups"]
    assert {key: set(one) for key, one in ours["state"].items()} == {
        key: set(one) for key, one in theirs["state"].items()
    }
    assert apart(remote.model, local.model) <= CLOSE
    away = train(RemoteOptimizer, url, "away", resume="local/checkpoint-10")
    home = train(Local, url, "home", resume="remote/checkpoint-10")
    assert apart(away.model, local.model) <= CLOSE
    assert apart(home.model, local.model) <= CLOSE


class Shadow(TrainerCallback):
    """A twin of the model that torch's AdamW steps on the very gradients the server gets."""

    def on_train_begin(self, args, state, control, *, model, optimizer, **_):
        self.twin = copy.deepcopy(model)
        twins = dict(zip(model.parameters(), self.twin.parameters(), strict=True))
        groups = [
            {**group, "params": [twins[param] for param in group["params"]]}
            for group in optimizer.param_groups
        ]
        self.local = torch.optim.AdamW(groups)

    def on_pre_optimizer_step(self, args, state, control, *, model, optimizer, **_):
        for mine, other in zip(self.twin.parameters(), model.parameters(), strict=True):
            mine.grad = other.grad.clone()
        for mine, other in zip(self.local.param_groups, optimizer.param_groups, strict=True):
            mine["lr"] = other["lr"]
        self.local.step()


class Fused(Local):
    """torch's AdamW, with products fused in other places."""

    def __init__(self, params, url, **options):
        super().__init__(params, url, fused=True, **options)


def test_bf16(url):
    """Step by step on the same gradients.

    Two whole runs are further apart, for the last bit of a parameter decides how bfloat16 rounds an
    activation, by 1/256, and Adam makes a whole step of a tiny gradient. So are two ways of torch's
    own, fused and not.
    """
    shadow = Shadow()
    remote = train(RemoteOptimizer, url, "shadowed", bf16=True, callbacks=[shadow])
    assert apart(remote.model, shadow.twin) <= CLOSE
    assert moved(remote.model, language_model())
    local, other = (train(kind, url, kind.__name__, bf16=True) for kind in (Local, Fused))
    assert apart(remote.model, local.model) <= 10 * apart(other.model, local.model)


@pytest.mark.parametrize("page", ["trainer", "optimizers"])
def test_the_page(url, page):
    made = []
    for kind in (Local, RemoteOptimizer):
        code = pages.program("transformers", page, url)
        names = {"model": language_model(), "dataset": sentences(), "args": arguments("out")}
        made.append(pages.run(code, kind, **names)["trainer"])
    local, remote = made
    assert apart(remote.model, local.model) <= CLOSE
    assert moved(remote.model, language_model())
    optimizer = remote.optimizer.optimizer
    assert optimizer.summary.step == 20
    said = optimizer.session.info()
    assert [group["weight_decay"] for group in said["groups"]] == [0.0]
    names = {row["name"] for row in said["layout"]}
    assert names == (
        {f"param.{place}" for place in range(len(names))}
        if page == "trainer"
        else {name for name, _ in remote.model.named_parameters()}
    )
    history = optimizer.session.history()
    assert [row["lr"] for row in history] == pytest.approx(
        [5e-3 * (n / 5 if n < 5 else (20 - n) / 15) for n in range(20)], rel=1e-12
    )
    assert max(row["grad_norm"] for row in history) == pytest.approx(0.5, rel=1e-5)  # clipped
    optimizer.session.delete()


def test_the_page_says_where_to_resume(url):
    """In a session that still lives, the session's parameters are taken; so it is deleted first."""
    train(RemoteOptimizer, url, "whole", id="run")
    whole = train(RemoteOptimizer, url, "again")
    checkpoint = "whole/checkpoint-10"
    lives = train(RemoteOptimizer, url, "lives", resume=checkpoint, id="run")
    assert apart(lives.model, whole.model) > 0.01
    lives.optimizer.optimizer.session.delete()
    resumed = train(RemoteOptimizer, url, "resumed", resume=checkpoint, id="run")
    assert apart(resumed.model, whole.model) == 0
