"""A model twice: one under torch's own optimizer, one under a remote one."""

import copy

import numpy as np
import torch
from torch.testing._internal.common_optimizers import optim_db

from gradpost.torch.rules import TORCH

RULES = {kind: rule for rule, kind in TORCH.items()}
SHAPES = ((7, 5), (3,), (), (16, 17), (0, 4))
OTHER_SHAPES = {
    torch.optim.Adafactor: (
        (7, 5),
        (3,),
        (),
        (16, 17),
        (4, 3, 2),
    ),  # torch's divides by a size of 0
    torch.optim.Muon: ((7, 5), (16, 17), (30, 4)),  # matrices only
}
LATER = ("LBFGS", "SparseAdam")
CLOSE = 3e-6
FAR = {torch.optim.Muon: 3e-2}
"""torch's Newton-Schulz is in bfloat16, the server's in float32."""


def params(*shapes, seed=0, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=made).to(dtype))
        for shape in shapes or SHAPES
    ]


def twice(*shapes, **options):
    ours = params(*shapes, **options)
    return ours, copy.deepcopy(ours)


def feed(*models, seed=0, absent=()):
    """The same random gradients for each; none where `absent` names the place."""
    made = torch.Generator().manual_seed(seed)
    for at, row in enumerate(zip(*models, strict=True)):
        grad = torch.randn(row[0].shape, generator=made).to(row[0].dtype)
        for param in row:
            param.grad = None if at in absent else grad.clone()


def assert_close(ours, theirs, close=CLOSE):
    for mine, other in zip(ours, theirs, strict=True):
        if other.numel():
            scale = other.abs().max().item()
            assert (mine - other).abs().max().item() <= close * scale


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.detach().float().numpy(), other.detach().float().numpy())


def table(skip):
    """(torch's class, its rule, options, id) of every configuration in torch's own table."""
    for info in optim_db:
        name = info.optim_cls.__name__
        if info.optim_cls not in RULES:
            skip(name)
            continue
        for made in info.optim_inputs_func(device="cpu"):
            yield info.optim_cls, RULES[info.optim_cls], made.kwargs, f"{name}-{made.desc}"


class Recorder:
    """A transport that keeps what was sent."""

    def __init__(self, transport):
        self._transport = transport
        self.calls = []

    def request(self, method, path, headers, body, timeout_s):
        self.calls.append((method, path, list(body)))
        return self._transport.request(method, path, headers, body, timeout_s)

    def close(self):
        pass

    def pushes(self):
        return [call for call in self.calls if call[0] == "POST" and "/steps" in call[1]]
