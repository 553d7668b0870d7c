"""Lazy rows beside torch's sparse gradients: SGD, Adagrad, and SparseAdam but for its eps."""

import asyncio

import numpy as np
import pytest
import torch

from kernels.pool import Pool
from service.limits import Budget
from service.metrics import Metrics
from service.schemas import parse_control, parse_spec
from service.sessions.pushes import Gradient
from service.sessions.registry import Sessions
from service.sessions.session import Shared
from service.settings import Settings
from service.wire.rows import Rows

ROWS, WIDTH = 50, 6
KINDS = {"F32": torch.float32, "F64": torch.float64}
CLOSE = {"F32": {"rtol": 2e-5, "atol": 2e-5}, "F64": {"rtol": 1e-11, "atol": 1e-11}}
TORCH = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.SparseAdam}
CASES = [
    ("sgd", {"lr": 0.1}, {}),
    ("sgd", {"lr": 0.1, "maximize": True}, {}),
    ("adagrad", {"lr": 0.1}, {}),
    ("adagrad", {"lr": 0.1, "lr_decay": 0.05, "initial_accumulator_value": 0.5, "eps": 1e-3}, {}),
    ("adam", {"lr": 0.01, "eps": 1e-30}, {}),
    ("adam", {"lr": 0.01, "eps": 1e-30, "betas": (0.5, 0.75), "maximize": True}, {}),
    # SparseAdam adds eps to the root of v before the correction: not the same, but near
    ("adam", {"lr": 0.01, "eps": 1e-8}, {"rtol": 1e-4, "atol": 1e-6}),
]


@pytest.fixture(scope="module")
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


def batches(seed, count):
    """Rows and their gradients; another number of rows each time, none among them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        idx = np.sort(rng.choice(ROWS, rng.integers(0, ROWS // 2), replace=False))
        yield idx.astype(np.int64), rng.standard_normal((idx.size, WIDTH))


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize(("rule", "options", "close"), CASES)
def test_rows_alone_are_torchs_sparse_gradients(pool, rule, options, close, dtype):
    sessions = Sessions(Shared(Settings(), pool, Budget(1 << 24), Metrics()))
    kind = {"F32": np.float32, "F64": np.float64}[dtype]
    first = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(kind)
    theirs = torch.nn.Parameter(torch.tensor(first))
    optimizer = TORCH[rule]([theirs], **options)

    async def scenario():
        given = {"rule": rule, "lazy": True, **options}
        spec = parse_spec({"optimizer": given, "dtype": dtype})[0]
        session = await sessions.create("s", spec)
        await session.load([("emb", dtype, first.shape, first.ravel())], first_only=True)
        for idx, values in batches(2, 30):
            values = values.astype(kind)
            theirs.grad = torch.sparse_coo_tensor(
                torch.tensor(idx)[None], torch.tensor(values), theirs.shape, check_invariants=True
            ).to(KINDS[dtype])
            with torch.sparse.check_sparse_tensor_invariants():  # unstated, torch warns
                optimizer.step()
            flat = np.full(ROWS * WIDTH, np.nan, kind)
            rows = (Rows(0, WIDTH, idx, values.ravel()),)
            control = parse_control({}, text=False)
            await session.push(Gradient(flat, dtype, control, lambda: None, None, rows), hold=False)
            ours = session.arena.versions.head.flat.reshape(ROWS, WIDTH)
            np.testing.assert_allclose(ours, theirs.detach().numpy(), **(close or CLOSE[dtype]))
        kept = optimizer.state[theirs]
        for piece in session.arena.pieces():
            np.testing.assert_allclose(
                piece.flat.reshape(ROWS, WIDTH), kept[piece.slot].numpy(), **CLOSE[dtype]
            )

    asyncio.run(scenario())
