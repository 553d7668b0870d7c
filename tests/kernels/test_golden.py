"""Against vectors that scripts/golden.py made with torch: no torch needed here."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.kernels import cases

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "torch.npz")
ABOUT = json.loads(str(GOLDEN["about"]))


@pytest.mark.parametrize("index", range(len(ABOUT["configs"])))
@pytest.mark.parametrize(("master", "tolerance"), [("F64", 1e-12), ("F32", 2e-5)])
def test_equals_torch(index, master, tolerance):
    config = ABOUT["configs"][index]
    h = cases.hyper(config["rule"], **config["options"])
    p = GOLDEN["start"].astype(cases.NUMPY[master])
    state = cases.slots(config["rule"], h, p.size, master)
    assert sorted(cases.names(config["rule"], h)) == sorted(config["state"])
    run = cases.kernel(config["rule"], h, master, master)
    for count, values in enumerate(GOLDEN["grads"]):
        g = values.astype(p.dtype)
        run(p, p, g, state, cases.coefficients(config["rule"], h, count, master), 0, p.size)
        want = GOLDEN[f"{index}/params"][count]
        np.testing.assert_allclose(p, want, rtol=tolerance, atol=tolerance)
    scalars = cases.scalars(config["rule"], h, len(GOLDEN["grads"]))
    assert scalars == pytest.approx([*config["scalars"].values()], rel=1e-14)
    for name, ours in zip(cases.names(config["rule"], h), state, strict=True):
        want = GOLDEN[f"{index}/{name}"]
        np.testing.assert_allclose(ours, want, rtol=50 * tolerance, atol=tolerance * want.max())


def test_says_which_torch_made_them():
    assert ABOUT["torch"] == "2.13.0"
    without = {"momentum", "lion", "yogi"}  # rules that torch lacks
    assert {config["rule"] for config in ABOUT["configs"]} == set(cases.DEFAULTS) - without
