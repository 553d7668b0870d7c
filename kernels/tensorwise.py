"""The rules that need a whole tensor at once, for a norm, a mean or a matrix product.

Each takes ``(p_in, p_out, g, state, shape, hyper, lr, numbers)`` and tells whether every parameter
that it wrote is finite. All arrays are flat and of the master dtype; g is scratch of the caller,
as `gradient` makes it, and is overwritten. Norms and means are float64 sums in a fixed order and
one thread does a whole tensor, so that the bits depend on nothing else, but for the matrix
products of `muon`, which are the BLAS's.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kernels import blas, convert, passes, reduce
from kernels.cpu import MASTERS
from kernels.registry import RULES, Hyper, corrections

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Numbers = tuple[float, ...]
Function = Callable[[Array, Array, Array, tuple[Array, ...], Shape, Hyper, float, Numbers], bool]


def gradient(
    wire: Array, dtype: str, master: str, hyper: Hyper, factor: float, limit: float | None
) -> Array:
    """Returns the gradient as a rule wants it: of the master dtype, clipped, scaled, turned.

    Args:
        wire: [n] of dtype; only read.
        dtype: F64, F32, F16 or BF16.
        master: F32 or F64.
        hyper: Says whether to maximize.
        factor: What it is multiplied by, after clipping.
        limit: The largest size of an element; None: any.
    """
    g: Array = np.empty(wire.size, np.float32 if master == "F32" else np.float64)
    convert.convert(wire, dtype, g, master, 0, wire.size)
    factor = -factor if hyper["maximize"] else factor
    if factor != 1.0 or limit is not None:
        passes.run(passes.scaled, (g,), (factor, math.inf if limit is None else limit))
    return g


def numbers(rule: str, hyper: Hyper, count: int) -> Numbers:
    """What a rule takes from the number of updates that a tensor has had before.

    Powers are the C library's and may differ in the last bit from one machine to another: whoever
    wants to repeat an update to the bit keeps these numbers.
    """
    if rule == "lamb":
        lift, unbias = corrections(hyper, count, 1.0)
        return lift, unbias
    if rule == "adafactor":
        return float(count + 1) ** hyper["beta2_decay"], 1.0 / math.sqrt(count + 1)
    return ()


def step(
    rule: str,
    p_in: Array,
    p_out: Array,
    g: Array,
    state: tuple[Array, ...],
    shape: Shape,
    hyper: Hyper,
    lr: float,
    numbers: Numbers,
) -> bool:
    """Updates one tensor: p_out and each state array, in place.

    Args:
        rule: A name in `FUNCTIONS`.
        p_in: master[n], the parameters before; may be p_out itself, must not overlap it otherwise.
        p_out: master[n], receives the parameters after.
        g: master[n], from `gradient`; overwritten.
        state: The arrays of the slots that a tensor of this shape has, in their order.
        shape: Of the tensor, n elements.
        hyper: Effective hyperparameters.
        lr: Of this update.
        numbers: What `numbers` gives for this update.

    Returns:
        True iff every parameter written is finite.

    Raises:
        ValueError: An array of another dtype or size, or one that is not contiguous. Nothing was
            written.
    """
    kept = [slot.shape(shape) for slot in RULES[rule].slots(hyper)]
    sizes = [math.prod(one) for one in (shape, shape, shape, *kept) if one is not None]
    arrays = (p_in, p_out, g, *state)
    if [array.size for array in arrays] != sizes or p_out.dtype not in MASTERS.values():
        raise ValueError(f"{rule}: needs arrays of {sizes} elements, float32 or float64")
    if any(a.dtype != p_out.dtype or not a.flags.c_contiguous for a in arrays):
        raise ValueError(f"{rule}: needs contiguous arrays of {p_out.dtype}")
    if not p_out.size:
        return True
    with np.errstate(all="ignore"):
        return FUNCTIONS[rule](p_in, p_out, g, state, shape, hyper, lr, numbers)


def _norm(x: Array) -> float:
    return math.sqrt(reduce.total(reduce.sumsq(x, _master(x), 0, x.size)))


def _master(x: Array) -> str:
    return "F64" if x.dtype == np.float64 else "F32"


def _move(p_in: Array, p_out: Array, r: Array, step: float, decay: float = 0.0) -> bool:
    """Takes p = (1 + decay)*p + step*r; tells whether p is finite."""
    return bool(passes.run(passes.moved, (p_in, p_out, r), (step, decay), p_in is not p_out))


def lamb(
    p_in: Array, p_out: Array, g: Array, state: tuple[Array, ...],
    shape: Shape, hyper: Hyper, lr: float, numbers: Numbers,
) -> bool:  # fmt: skip
    """Takes p -= lr * ||p||/||r|| * r, r = m_hat/(sqrt(v_hat) + eps) + weight_decay*p.

    You et al. 2020, Algorithm 2, with the identity for phi. Where a norm is 0 the ratio is 1.
    """
    b1, b2 = hyper["betas"]
    lift, unbias = numbers
    h = (b1, 1.0 - b1, b2, 1.0 - b2, lift, unbias, hyper["eps"], hyper["weight_decay"])
    passes.run(passes.adapted, (p_in, g, *state), h)
    size, length = _norm(p_in), _norm(g)
    ratio = size / length if size > 0 and length > 0 else 1.0
    return _move(p_in, p_out, g, -lr * ratio)


def lars(
    p_in: Array, p_out: Array, g: Array, state: tuple[Array, ...],
    shape: Shape, hyper: Hyper, lr: float, numbers: Numbers,
) -> bool:  # fmt: skip
    """Takes v = mu*v + lr*ratio*(g + weight_decay*p); p -= v (You et al. 2017, Algorithm 1).

    ratio = trust_coefficient * ||p||/(||g|| + weight_decay*||p|| + eps); 1 where a norm is 0.
    With nesterov p -= mu*v + lr*ratio*(g + weight_decay*p).
    """
    (v,) = state
    mu, wd = hyper["momentum"], hyper["weight_decay"]
    size, length = _norm(p_in), _norm(g)
    ratio = 1.0
    if size > 0 and length > 0:
        ratio = hyper["trust_coefficient"] * size / (length + wd * size + hyper["eps"])
    if wd:
        passes.run(passes.blended, (g, p_in), (1.0, wd))
    passes.run(passes.blended, (v, g), (mu, lr * ratio))
    if not hyper["nesterov"]:
        return _move(p_in, p_out, v, -1.0)
    passes.run(passes.blended, (g, v), (lr * ratio, mu))
    return _move(p_in, p_out, g, -1.0)


def adafactor(
    p_in: Array, p_out: Array, g: Array, state: tuple[Array, ...],
    shape: Shape, hyper: Hyper, lr: float, numbers: Numbers,
) -> bool:  # fmt: skip
    """Takes p -= lr*weight_decay*p + a*u/max(1, rms(u)/d), u = g/sqrt(v).

    Shazeer & Stern 2018, Algorithms 4 and 5, in torch's form: v is an average of g*g with
    1 - t**beta2_decay, of its rows and columns where there are two dimensions or more;
    a = max(eps[1], rms(p)) * min(lr, 1/sqrt(t)).
    """
    root = math.sqrt(g.size)
    eps, least = hyper["eps"]
    eps = float(np.finfo(g.dtype).eps) if eps is None else eps
    take, bound = numbers
    h = (1.0 - take, take, eps * eps)
    if len(shape) > 1:
        sums = np.empty(shape[-1], np.float64)
        passes.run(passes.factored, (g, *state, sums), (*h, eps), *shape[-2:])
    else:
        passes.run(passes.whitened, (g, *state), h)
    length = max(least, _norm(p_in) / root) * min(lr, bound)
    excess = max(1.0, _norm(g) / (root * hyper["d"]))
    return _move(p_in, p_out, g, -length / excess, -lr * hyper["weight_decay"])


def muon(
    p_in: Array, p_out: Array, g: Array, state: tuple[Array, ...],
    shape: Shape, hyper: Hyper, lr: float, numbers: Numbers,
) -> bool:  # fmt: skip
    """Takes b = mu*b + (1-mu)*g; p -= lr*(weight_decay*p + ratio*ns(b)) (Jordan et al. 2024).

    ns makes all singular values nearly 1. With nesterov it takes mu*b + (1-mu)*g. ratio is
    sqrt(max(1, rows/columns)), or 0.2*sqrt(max(rows, columns)) (Liu et al. 2025) if
    adjust_lr_fn is match_rms_adamw.
    """
    (b,) = state
    mu = hyper["momentum"]
    passes.run(passes.blended, (b, g), (mu, 1.0 - mu))
    if hyper["nesterov"]:
        passes.run(passes.blended, (g, b), (1.0 - mu, mu))
    else:
        g[:] = b
    rows, columns = shape
    ratio = math.sqrt(max(1.0, rows / columns))
    if hyper["adjust_lr_fn"] == "match_rms_adamw":
        ratio = 0.2 * math.sqrt(max(rows, columns))
    r = _orthogonal(g.reshape(shape), hyper["ns_coefficients"], hyper["ns_steps"], hyper["eps"])
    return _move(p_in, p_out, r.reshape(-1), -lr * ratio, -lr * hyper["weight_decay"])


def _orthogonal(
    x: Array, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Array:
    """Newton-Schulz: x = a*x + (b*xx' + c*(xx')**2)x, from x of norm 1 on; x is overwritten.

    The smaller of xx' and x'x is taken, which gives the same, and torch's by transposing.
    """
    a, b, c = coefficients
    size = max(_norm(x.reshape(-1)), eps)
    passes.run(passes.scaled, (x.reshape(-1),), (1.0 / size if size else 0.0, math.inf))
    wide = x.shape[0] <= x.shape[1]
    y = np.empty_like(x)
    gram = np.empty((min(x.shape),) * 2, x.dtype)
    square = np.empty_like(gram)
    with blas.one_thread():
        for _ in range(steps):
            np.matmul(x if wide else x.T, x.T if wide else x, out=gram)
            np.matmul(gram, gram, out=square)
            passes.run(passes.blended, (square.reshape(-1), gram.reshape(-1)), (c, b))
            np.matmul(square if wide else x, x if wide else square, out=y)
            passes.run(passes.blended, (y.reshape(-1), x.reshape(-1)), (1.0, a))
            x, y = y, x
    return x


FUNCTIONS: Final[Mapping[str, Function]] = {
    function.__name__: function for function in (lamb, lars, adafactor, muon)
}
"""Every rule per tensor by its name on the wire."""

_PASSES: Final[Mapping[str, tuple[Callable[..., Any], ...]]] = {
    "lamb": (passes.adapted,),
    "lars": (passes.blended,),
    "adafactor": (passes.whitened, passes.factored),
    "muon": (passes.blended,),
}


def warm(rule: str, master: str, grad: str) -> None:
    """Compiles or loads what a rule runs over gradients of a dtype."""
    passes.warm((passes.scaled, passes.moved, *_PASSES[rule]), master)
    reduce.warm([master])
    convert.warm(grad, master)
