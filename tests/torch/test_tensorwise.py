"""Live parity of the rules per tensor: Adafactor closely, Muon loosely, for torch's is bfloat16."""

import numpy as np
import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

from tests.kernels import cases
from tests.kernels.test_tensorwise import start, step

SHAPES = [(), (1,), (3,), (17,), (17, 5), (5, 17), (4, 3, 2), (64, 33), (300, 257)]
CLOSE = {"F32": 2e-5, "F64": 1e-11}
IGNORED = {"foreach", "capturable", "differentiable"}


def table(wanted):
    """Options of every configuration in torch's table, each once."""
    for info in optim_db:
        if info.optim_cls.__name__ != wanted:
            continue
        seen = []
        for made in info.optim_inputs_func(device="cpu"):
            options = {k: v for k, v in made.kwargs.items() if k not in IGNORED}
            options = {k: float(v) if torch.is_tensor(v) else v for k, v in options.items()}
            if options not in seen:
                seen.append(options)
                yield pytest.param(options, id=(made.desc or "none").replace(" ", "_"))


def ours(rule, options):
    defaults = {"muon": {"weight_decay": 0.1}, "adafactor": {"weight_decay": 0.0}}[rule]
    return cases.hyper(rule, **{**defaults, **options})


def follow(rule, options, master, shape, steps, *, scale=1.0, grad=None, **kind):
    """Runs both side by side; yields before, ours and theirs after each step, and both states."""
    h = ours(rule, options)
    rng, p, state = start(rule, h, shape, master)
    theirs = torch.nn.Parameter(torch.tensor(p))
    name = {"adafactor": "Adafactor", "muon": "Muon"}[rule]
    optimizer = getattr(torch.optim, name)([theirs], **options, **kind)
    for count in range(steps):
        g = cases.encode(np.ravel(rng.standard_normal(shape) * scale), grad or master)
        seen = cases.decode(g, grad or master).reshape(shape)
        theirs.grad = torch.tensor(seen).to(theirs.dtype)
        before = p.copy()
        optimizer.step()
        step(rule, h, count, p, seen, state, grad=grad)
        yield before, p, theirs.detach().numpy(), state, optimizer.state[theirs]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("master", ["F32", "F64"])
@pytest.mark.parametrize("options", list(table("Adafactor")))
def test_every_configuration_of_torchs_table_for_adafactor(options, master, shape):
    close = CLOSE[master]
    for _, mine, theirs, state, kept in follow("adafactor", options, master, shape, 8):
        np.testing.assert_allclose(mine, theirs, rtol=close, atol=close)
        for name, ours in state.items():
            assert ours.shape == tuple(kept[name].shape)
            np.testing.assert_allclose(ours, kept[name].numpy(), rtol=close * 10, atol=1e-12)


@pytest.mark.parametrize("options", [{"eps": (1e-30, 1e-3)}, {"eps": (0.5, 2.0)}, {"lr": 2.0}])
@pytest.mark.parametrize("foreach", [False, True])
def test_adafactors_eps_and_lr_and_foreach(options, foreach):
    for shape in ((5,), (6, 7)):
        for _, mine, theirs, *_ in follow("adafactor", options, "F32", shape, 20, foreach=foreach):
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e-8, 1e6])
def test_adafactor_with_denormal_tiny_and_huge_gradients(scale):
    for shape in ((257,), (16, 17)):
        for _, mine, theirs, *_ in follow("adafactor", {}, "F32", shape, 4, scale=scale):
            np.testing.assert_allclose(mine, theirs, rtol=3e-5, atol=3e-5)


def test_adafactor_steps_where_torch_overflows():
    """torch multiplies rows by columns before it divides: nothing moves, the root is infinite."""
    before, mine, theirs, *_ = next(follow("adafactor", {}, "F32", (16, 17), 1, scale=1e15))
    np.testing.assert_array_equal(theirs, before)
    assert (mine != before).all()


@pytest.mark.parametrize("grad", ["F16", "BF16"])
def test_adafactor_with_16_bit_gradients(grad):
    for _, mine, theirs, *_ in follow("adafactor", {}, "F32", (33, 20), 4, grad=grad):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(17, 5), (5, 17), (64, 64), (300, 257), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("master", ["F32", "F64"])
@pytest.mark.parametrize(
    "options",
    [
        *table("Muon"),
        {"nesterov": False},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"adjust_lr_fn": "original", "eps": 1e-3},
    ],
)
def test_every_configuration_of_torchs_table_for_muon(options, master, shape):
    """The buffer is torch's; the step differs by the rounding of bfloat16, some percent."""
    h = ours("muon", options)
    decay = 1 - h["lr"] * h["weight_decay"]
    for before, mine, theirs, state, kept in follow("muon", options, master, shape, 1):
        buffer = kept["momentum_buffer"].numpy()
        np.testing.assert_allclose(state["momentum_buffer"], buffer, rtol=1e-5, atol=1e-7)
        step_of_ours, step_of_theirs = mine - decay * before, theirs - decay * before
        off = np.linalg.norm(step_of_ours - step_of_theirs)
        assert off < 0.05 * np.linalg.norm(step_of_theirs)
