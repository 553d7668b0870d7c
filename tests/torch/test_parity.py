"""Live parity with torch's optimizers on the CPU, over torch's own table of options."""

import itertools

import numpy as np
import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

from kernels.registry import RULES
from tests.kernels import cases

NAMES = {
    "SGD": "sgd",
    "Adagrad": "adagrad",
    "RMSprop": "rmsprop",
    "Adadelta": "adadelta",
    "Adam": "adam",
    "AdamW": "adamw",
    "Adamax": "adamax",
    "NAdam": "nadam",
    "RAdam": "radam",
    "ASGD": "asgd",
    "Rprop": "rprop",
}
IGNORED = {
    "foreach",
    "fused",
    "capturable",
    "differentiable",
}  # how torch loops, not what it computes
DTYPES = {"F32": torch.float32, "F64": torch.float64}


@pytest.fixture(autouse=True)
def _float64_scalars():
    # torch keeps mu_product, eta and mu in its default dtype, we in float64
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def table():
    """(optimizer name, options) of every configuration in torch's table, each once."""
    for info in optim_db:
        name = info.optim_cls.__name__
        if name not in NAMES:
            continue
        seen = []
        for made in info.optim_inputs_func(device="cpu"):
            options = {k: v for k, v in made.kwargs.items() if k not in IGNORED}
            options = {k: float(v) if torch.is_tensor(v) else v for k, v in options.items()}
            if "betas" in options:
                options["betas"] = tuple(float(beta) for beta in options["betas"])
            if options not in seen:
                seen.append(options)
                yield pytest.param(
                    name, options, id=f"{name}-{made.desc or len(seen)}".replace(" ", "_")
                )


def ours(name, options):
    rule = NAMES[name]
    extra = {"eps_inside_sqrt": False} if rule == "rmsprop" else {}
    return rule, cases.hyper(rule, **extra, **options)


def follow(name, options, master, size, steps, *, scale=1.0, fused=False, grad=None, seed=0):
    """Runs both side by side; yields both parameters after each step, and states at the end."""
    rule, h = ours(name, options)
    rng = np.random.default_rng(seed)
    p = rng.standard_normal(size).astype(cases.NUMPY[master])
    theirs = torch.nn.Parameter(torch.tensor(p))
    kind = {"fused": True} if fused else {"foreach": False}
    optimizer = getattr(torch.optim, name)([theirs], **kind, **options)
    state = cases.slots(rule, h, size, master)
    run = cases.kernel(rule, h, master, grad or master)
    for count in range(steps):
        g = cases.encode(rng.standard_normal(size) * scale, grad or master)
        theirs.grad = torch.tensor(cases.decode(g, grad or master)).to(DTYPES[master])
        optimizer.step()
        run(p, p, g, state, cases.coefficients(rule, h, count, master), 0, size)
        yield p, theirs.detach().numpy()
    kept = optimizer.state[theirs]
    scalars = cases.scalars(rule, h, steps)
    assert scalars == pytest.approx([float(kept[x]) for x in RULES[rule].scalars], rel=1e-12)
    for slot, mine in zip(cases.names(rule, h), state, strict=True):
        want = kept[slot].numpy()
        np.testing.assert_allclose(
            mine, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(initial=0) + 1e-44
        )


CLOSE = {"F32": {"rtol": 2e-5, "atol": 2e-5}, "F64": {"rtol": 1e-11, "atol": 1e-11}}


@pytest.mark.parametrize("size", [0, 1, 3, 17, 4097])
@pytest.mark.parametrize("master", ["F32", "F64"])
@pytest.mark.parametrize(("name", "options"), list(table()))
def test_every_configuration_of_torchs_table(name, options, master, size):
    for mine, theirs in follow(name, options, master, size, 8):
        np.testing.assert_allclose(mine, theirs, **CLOSE[master])


@pytest.mark.parametrize("name", NAMES)
def test_odd_large_size_and_many_steps(name):
    for mine, theirs in follow(name, {}, "F32", 100_003, 3):
        np.testing.assert_allclose(mine, theirs, **CLOSE["F32"])
    for mine, theirs in follow(name, {}, "F64", 17, 1000):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e-8, 1e6, 1e15])
@pytest.mark.parametrize("name", NAMES)
def test_denormal_tiny_and_huge_gradients(name, scale):
    for mine, theirs in follow(name, {}, "F32", 257, 4, scale=scale):
        np.testing.assert_allclose(mine, theirs, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("grad", ["F16", "BF16"])
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_gradients(name, grad):
    for mine, theirs in follow(name, {}, "F32", 4097, 4, grad=grad):
        np.testing.assert_allclose(mine, theirs, **CLOSE["F32"])


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused(name):
    for mine, theirs in follow(name, {}, "F32", 4097, 10, fused=True):
        np.testing.assert_allclose(mine, theirs, **CLOSE["F32"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinite_and_nan_parameters_stay_what_torch_leaves(name, bad):
    options = {} if name == "Rprop" else {"weight_decay": 0}
    rule, h = ours(name, options)
    p = np.array([bad, 1.0, -2.0], np.float32)
    theirs = torch.nn.Parameter(torch.tensor(p))
    optimizer = getattr(torch.optim, name)([theirs], foreach=False, **options)
    state = cases.slots(rule, h, 3, "F32")
    run = cases.kernel(rule, h, "F32", "F32")
    for count, g in enumerate(itertools.repeat(np.ones(3, np.float32), 3)):
        theirs.grad = torch.tensor(g)
        optimizer.step()
        assert not run(p, p, g, state, cases.coefficients(rule, h, count, "F32"), 0, 3)
        np.testing.assert_allclose(p, theirs.detach().numpy(), rtol=1e-6)


def test_momentum_is_torchs_exponential_average():
    # torch has no such rule; SGD with dampening 1 - (1 - beta) is it, once its buffer is there
    h = cases.hyper("momentum", beta=0.9, lr=0.1)
    run = cases.kernel("momentum", h, "F64", "F64")
    rng = np.random.default_rng(3)
    p = rng.standard_normal(17)
    theirs = torch.nn.Parameter(torch.tensor(p))
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, dampening=0.9)
    optimizer.state[theirs]["momentum_buffer"] = torch.zeros(17, dtype=torch.float64)
    state = cases.slots("momentum", h, 17, "F64")
    for count in range(20):
        g = rng.standard_normal(17)
        theirs.grad = torch.tensor(g)
        optimizer.step()
        run(p, p, g, state, cases.coefficients("momentum", h, count, "F64"), 0, 17)
    np.testing.assert_allclose(p, theirs.detach().numpy(), rtol=1e-12)
