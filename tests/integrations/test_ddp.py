"""DDP in two processes, beside one process with the whole batches and torch's AdamW."""

import pytest
import torch

from tests.integrations import ranks, tiny
from tests.integrations.pages import CLOSE, Local, apart, moved


@pytest.fixture(scope="module")
def whole():
    """What one process makes of the whole batches."""
    net = tiny.network().eval()
    optimizer = Local(net, None, rule="adamw", lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    for inputs, targets in tiny.loader(ranks.BATCHES, ranks.SIZE):
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    assert moved(net, tiny.network())
    return net


@pytest.mark.parametrize("way", ["broadcast", "pull"])
def test_rank_0_pushes_and_the_others_follow(url, whole, way):
    ((first, second),) = ranks.run("ddp", way, url, "Remote")
    assert apart(second, first) == 0
    assert apart(first, whole) <= CLOSE
