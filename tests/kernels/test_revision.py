"""The table of digests against this build, and digests under another processor."""

import os
import platform
import re
import subprocess
import sys

import numpy as np
import pytest

from kernels import blas, digests, revision, tensorwise
from kernels.registry import COEFFICIENTS, RULES
from scripts import digests as script
from service import warm
from tests.kernels import cases

STALE = (
    "kernels/revision.py is stale: run `make renew-digests`. If a rule that was there before is "
    "among the rows, logs written before cannot be replayed: say so in CHANGELOG.md."
)
X86 = platform.machine() in ("x86_64", "AMD64")
# Every rule under the usual dtypes, which the oracle's tests compile anyway. A loop is put together
# from a rule, a load and a clamp: one rule shows all loads and the clamp. `make digests` compiles
# the rest, for minutes.
ROWS = [row for row in revision.DIGESTS if not row.endswith(" others")] + ["adam others"]
FEW = [
    "adam F32 F32", "adam F32 BF16", "lion F32 F32", "rprop F64 F64", "yogi F32 F32",
    "convert F64 BF16", "convert F32 F16", "average F32", "accumulate BF16 F32", "robust F16 F64",
]  # fmt: skip


def members(row):
    return [name for name, case in digests.cases().items() if case.entry == row]


def test_the_table_has_a_row_for_everything():
    rows = [case.entry for case in digests.cases().values()]
    assert list(revision.DIGESTS) == list(dict.fromkeys(rows)), STALE
    per_tensor = {rule for rule in RULES if RULES[rule].tensorwise}
    assert {row.removesuffix(" others") for row in rows} == {
        *COEFFICIENTS, *per_tensor, "convert", "average", *revision.ROUNDS
    }  # fmt: skip
    assert set(tensorwise.FUNCTIONS) == per_tensor
    assert digests.USUAL == tuple(cases.PAIRS)
    assert digests.GRADIENTS == warm.GRADIENTS


@pytest.mark.parametrize("row", ROWS)
def test_the_table_is_what_this_process_computes(row):
    found = {name: digests.digest(name) for name in members(row)}
    assert digests.table(found) == {row: revision.DIGESTS[row]}, STALE


@pytest.mark.skipif(not X86, reason="the other processors are x86")
def test_digests_are_the_same_under_another_processor(tmp_path):
    found = script.under("generic", FEW, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "generic"]
    assert found == {name: digests.digest(name) for name in FEW}


def test_a_loop_that_computes_something_else_is_seen(monkeypatch):
    before = digests.digest("convert F32 BF16")
    right = digests.convert.convert

    def wrong(src, source, dst, target, lo, hi):
        finite = right(src, source, dst, target, lo, hi)
        dst[-1] ^= 1
        return finite

    monkeypatch.setattr(digests.convert, "convert", wrong)
    assert digests.digest("convert F32 BF16") != before


def test_no_last_bit_of_a_power_could_turn_a_coefficient():
    """C libraries differ in it: by 2**-52, and what is computed from it by some hundred times."""
    seen = 0
    for rule, entry in RULES.items():
        for hyper in digests.configurations(rule):
            steps = (
                (tensorwise.numbers(rule, hyper, count) for count in digests.COUNTS)
                if entry.tensorwise
                else digests.coefficients(rule, hyper)
            )
            for number in (number for step in steps for number in step):
                near = {np.float32(number * (1 + side * 2.0**-44)) for side in (-1, 0, 1)}
                assert len(near) == 1, (rule, number)
                seen += 1
    assert seen > 1000


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_the_inputs_are_finite_and_of_every_kind(dtype):
    x = cases.decode(digests.values(dtype, 3), dtype)
    assert np.isfinite(x).all()
    low, high = {"F64": (-1022, 1023), "F16": (-14, 15)}.get(dtype, (-126, 127))
    for of_a_kind in (x == 0, (x != 0) & (abs(x) < 2.0**low), abs(x) >= 2.0**high, x < 0):
        assert 0.02 < of_a_kind.mean() < 0.6
    assert 0.75 < ((abs(x) >= 2.0**-6) & (abs(x) < 4)).mean() < 0.9
    tame = cases.decode(digests.values(dtype, 3, 4099, tame=True), dtype)
    assert abs(tame).max() < 4


def test_some_inputs_would_show_a_second_rounding():
    x = digests.values("F64", 3, 4099, tame=True)
    assert (x.astype(np.float32).astype(np.float16) != x.astype(np.float16)).any()


def test_the_inputs_are_these_bits():
    """They are made of the generator's raw bits, which no version of NumPy changes."""
    assert digests.values("F64", 0)[:2].tobytes().hex() == "289cfdbcfe309abf9d2d88df0b5194bf"
    assert digests.values("F32", 0)[:3].tobytes().hex() == "f587d1bc5e88a2bc803e05b7"
    assert digests.values("F16", 0)[:4].tobytes().hex() == "8ca614a529801024"
    assert digests.values("BF16", 0)[:4].tobytes().hex() == "d1bca2bc05b7823c"


def test_the_revision_is_that_of_the_rules_a_session_has(monkeypatch):
    assert all(re.fullmatch(r"[0-9a-f]{16}", digest) for digest in revision.DIGESTS.values())
    names = sorted({"adam" if name == "adamw" else name for name in RULES} - {"muon"})
    found = {name: revision.of([name]) for name in names}
    assert all(re.fullmatch(r"[0-9a-f]{16}", one) for one in found.values())
    assert len(set(found.values())) == len(names)
    assert revision.of(["adamw"]) == revision.of(iter(["adam", "adamw"])) == found["adam"]
    assert revision.of(["adam", "lamb"]) == revision.of(["lamb", "adam"]) != found["adam"]
    for row in revision.DIGESTS:
        changed = {**revision.DIGESTS, row: "0" * 16}
        monkeypatch.setattr(revision, "DIGESTS", changed)
        moved = {name for name in names if revision.of([name]) != found[name]}
        monkeypatch.undo()
        of_all = row in ("convert", "average")
        rule = row.partition(" ")[0].partition("_")[0]
        assert moved == (set(names) if of_all else {rule} - {"muon", *revision.ROUNDS}), row
    assert revision.of(["adam", "accumulate"]) not in (
        found["adam"],
        revision.of(["adam", "robust"]),
    )


def test_the_revision_under_muon_has_the_products_too(monkeypatch):
    before, adam = revision.of(["muon"]), revision.of(["adam"])
    assert re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{16}", before)
    revision._products.cache_clear()
    assert revision.of(["muon"]) == before
    right = np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b: right(a, b) * np.float32(1 + 2**-23))
    revision._products.cache_clear()
    try:
        assert revision.of(["muon"]) != before
        assert revision.of(["adam"]) == adam
    finally:
        revision._products.cache_clear()


@pytest.mark.skipif(not X86 or blas._found is None, reason="OpenBLAS has other code on x86")
def test_another_processor_of_the_blas_is_another_revision():
    code = "from kernels import revision; print(revision.of(['muon']))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=script.ROOT, capture_output=True, text=True,
            check=True, env={**os.environ, "OPENBLAS_CORETYPE": core}, timeout=60,
        ).stdout.strip()
        for core in ("Prescott", "Nehalem")
    }  # fmt: skip
    assert len(seen) == 2
    assert len({one.partition("-")[0] for one in seen}) == 1


def test_the_script_writes_the_table_as_it_stands():
    text = script.TABLE.read_text()
    assert script.rendered(text, revision.DIGESTS) == text
    other = script.rendered(text, {**revision.DIGESTS, "adam": "0" * 16})
    assert len(set(text.splitlines()) ^ set(other.splitlines())) == 2
    with pytest.raises(ValueError, match="no table"):
        script.rendered("", {})
    with pytest.raises(ValueError, match="no such row: adamm"):
        script.renew(["adamm"])


def test_the_script_tells_who_differs():
    names = list(digests.cases())
    native = dict.fromkeys(names, "0" * 16)
    lines, agree = script.compared({"native": native, "haswell": native | {"adam F32 F32": "1"}})
    assert not agree
    (row,) = (line for line in lines if line.startswith("adam  "))
    assert row.split() == ["adam", digests.table(native)["adam"], "DIFFERS", "DIFFERS"]
    assert lines[-2:] == [
        f"haswell: {len(names) - 1} of {len(names)} cases are equal",
        "  adam F32 F32 differs",
    ]


def test_the_script_agrees_where_all_do(monkeypatch):
    native = dict.fromkeys(digests.cases(), "0" * 16)
    monkeypatch.setattr(revision, "DIGESTS", digests.table(native))
    assert script.compared({"native": native, "haswell": native})[1]
    assert not script.compared({"native": native | {"lion F64 F64": "1"}, "haswell": native})[1]
