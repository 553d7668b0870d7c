"""Times the update rules against the memory's bandwidth and, where it is there, against torch.

Everything in one row is measured in one process, interleaved; medians are compared, never best
cases. ``python -m benchmarks.kernels [--quick] [--json FILE]``; torch is used if it can be
imported.
"""

import argparse
import importlib.util
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.floors import seconds, spread, touching
from kernels import cpu, tensorwise
from kernels.pool import Pool
from kernels.registry import RULES
from service.hyper import BY_NAME

Array = npt.NDArray[Any]

STATED = {"sgd": {"momentum": 0.9}, "adamw": {"weight_decay": 0.0}}
TORCH = {
    "sgd": ("SGD", {"momentum": 0.9}), "adagrad": ("Adagrad", {}), "rmsprop": ("RMSprop", {}),
    "adadelta": ("Adadelta", {}), "adam": ("Adam", {}), "adamw": ("AdamW", {}),
    "adamax": ("Adamax", {}), "nadam": ("NAdam", {}), "radam": ("RAdam", {}),
    "asgd": ("ASGD", {}), "rprop": ("Rprop", {}), "adafactor": ("Adafactor", {}),
    "muon": ("Muon", {}),
}  # fmt: skip
SCALARS = {"nadam": {"mu_product": 0.5}, "asgd": {"eta": 1e-3, "mu": 1.0}}
LARGEST = {"muon": 1_000_000, "lamb": 10_000_000, "lars": 10_000_000, "adafactor": 10_000_000}
"""Beyond that a row of a rule per tensor takes minutes and says nothing new."""
FUSED = {"sgd", "adagrad", "adam", "adamw"}
LR = 1e-3


class Memory(NamedTuple):
    """The arrays of one update. All calls of a row share them: where they lie is worth 20 %.

    Flat, but for the rules per tensor, whose parameters are one matrix of `shape`.
    """

    p: Array
    g: Array
    slots: tuple[Array, ...]
    shape: tuple[int, ...]


def hyper(rule: str) -> dict[str, Any]:
    """The service's own defaults; momentum where there is one, and no decay."""
    return BY_NAME[rule].model_validate({"rule": rule, **STATED.get(rule, {})}).model_dump()


def memory(rule: str, size: int) -> Memory:
    """Parameters and gradients at random, state at 0.1."""
    rng = np.random.default_rng(0)
    rows = 1 << (math.isqrt(size).bit_length() - 1)
    shape = (rows, size // rows) if RULES[rule].tensorwise else (size,)
    p, g = (rng.standard_normal(math.prod(shape), np.float32) for _ in range(2))
    shapes = [slot.shape(shape) for slot in RULES[rule].slots(hyper(rule))]
    kept = [np.full(math.prod(one), 0.1, np.float32) for one in shapes if one is not None]
    return Memory(p, g, tuple(kept), shape)


def ours(rule: str, arrays: Memory, pool: Pool) -> Callable[[], object]:
    """One update in place by our loop; alone below the size from which the pool helps."""
    if RULES[rule].tensorwise:
        return whole(rule, arrays)
    p, g, slots, _ = arrays
    run = cpu.kernel(RULES[rule].variant(hyper(rule)), "F32", "F32")
    entry, chosen = RULES[rule], hyper(rule)
    h = np.array(entry.coefficients(chosen, 10, LR, entry.start(chosen, LR)), np.float32)
    if len(cpu.chunks(0, p.size)) == 1:
        return lambda: run(p, p, g, slots, h, 0, p.size)
    return lambda: pool.run(spread(lambda lo, hi: run(p, p, g, slots, h, lo, hi), p.size))


def whole(rule: str, arrays: Memory) -> Callable[[], object]:
    """One update of one matrix by a rule per tensor, the conversion of its gradient included."""
    p, g, slots, shape = arrays
    chosen = hyper(rule)
    numbers = tensorwise.numbers(rule, chosen, 10)

    def update() -> None:
        scratch = tensorwise.gradient(g, "F32", "F32", chosen, 1.0, None)
        tensorwise.step(rule, p, p, scratch, slots, shape, chosen, LR, numbers)

    return update


def theirs(rule: str, arrays: Memory, threads: int) -> Callable[[], object] | None:
    """One update by torch's own optimizer, fused where torch has that; None without torch."""
    if rule not in TORCH or importlib.util.find_spec("torch") is None:
        return None
    import torch

    torch.set_num_threads(threads)
    name, options = TORCH[rule]
    p = torch.nn.Parameter(torch.from_numpy(arrays.p).view(arrays.shape))
    p.grad = torch.from_numpy(arrays.g).view(arrays.shape)
    form: dict[str, bool] = {"fused": True} if rule in FUSED else {"foreach": False}
    if rule == "muon":  # which has one form only
        form = {}
    optimizer = getattr(torch.optim, name)([p], lr=LR, **form, **options)
    if RULES[rule].tensorwise:  # its state has other shapes; torch makes its own
        optimizer.step()
        return lambda: optimizer.step()
    names = [slot.name for slot in RULES[rule].slots(hyper(rule))]
    state = dict(zip(names, map(torch.from_numpy, arrays.slots), strict=True))
    scalars = {name: torch.tensor(value) for name, value in SCALARS.get(rule, {}).items()}
    optimizer.state[p] = {"step": torch.tensor(10.0), **scalars, **state}
    return lambda: optimizer.step()


def measure(calls: dict[str, Callable[[], object]], samples: int, repeat: int) -> dict[str, float]:
    """Median seconds of each call, taken in turn."""
    for call in calls.values():
        seconds(call, max(1, repeat // 4))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            time.sleep(0.02)  # OpenMP's threads spin for a while after torch's turn, on our cores
            found[name].append(seconds(call, repeat))
    return {name: statistics.median(values) for name, values in found.items()}


def row(rule: str, size: int, threads: int, samples: int) -> dict[str, Any]:
    """Measures one rule at one size; ratios above 1 mean that ours is faster."""
    pool = Pool(threads)
    try:
        arrays = memory(rule, size)
        calls = {"ours": ours(rule, arrays, pool)}
        if (
            len(arrays.slots) == 2 and not RULES[rule].tensorwise
        ):  # the floor moves exactly their bytes
            calls["floor"] = touching((arrays.p, *arrays.slots), arrays.g, pool)
        if (torch := theirs(rule, arrays, threads)) is not None:
            calls["torch"] = torch
        found = measure(calls, samples, max(1, min(2000, 2_000_000 // size)))
    finally:
        pool.close()
    result: dict[str, Any] = {"rule": rule, "size": size, "threads": threads}
    result.update({f"{name}_us": value * 1e6 for name, value in found.items()})
    for name in ("floor", "torch"):
        if name in found:
            result[f"vs_{name}"] = found[name] / found["ours"]
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a row."""
    text = f"{result['rule']:9} {result['size']:>11,} x{result['threads']}"
    for name in ("ours", "floor", "torch"):
        if f"{name}_us" in result:
            text += f"  {name} {result[f'{name}_us']:>11,.2f} us"
    for name in ("floor", "torch"):
        if f"vs_{name}" in result:
            text += f"  {name}/ours {result[f'vs_{name}']:.2f}"
    print(text, flush=True)


def main() -> None:
    """Measures every rule at every size and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="Adam at 1 k, 1 M and 10 M only")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    parser.add_argument("--rules", nargs="*", choices=sorted(RULES))
    parser.add_argument("--sizes", nargs="*", type=int)
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--samples", type=int, default=9)
    args = parser.parse_args()
    rules = args.rules or (["adam"] if args.quick else list(RULES))
    sizes = args.sizes or (
        [1000, 1_000_000, 10_000_000]
        if args.quick
        else [1000, 100_000, 1_000_000, 10_000_000, 50_000_000]
    )
    rows = []
    for rule in rules:
        for size in [size for size in sizes if size <= LARGEST.get(rule, size)]:
            for threads in args.threads if size >= cpu.ALONE else args.threads[:1]:
                rows.append(row(rule, size, threads, args.samples))
                show(rows[-1])
    if args.json:
        about = {"machine": platform.machine(), "python": platform.python_version(), "rows": rows}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(about, file, indent=1)


if __name__ == "__main__":
    main()
