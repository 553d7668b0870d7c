"""One undecorated scalar function per update rule: the only place where a rule is written.

Each takes ``(p, g, *slots, c)``: the parameter, its gradient, the state, and a tuple of
coefficients that `kernels.registry` computes once per step; all are scalars of the master dtype,
float32 or float64. It returns ``(p, *slots)``, in the same order. Rules hold no literals (a
literal would widen float32 to float64), and every product that is added goes through `fma`, so
that the CPU, a GPU and plain Python agree to the bit. Every coefficient tuple ends with ``wd,
sign``: L2 decay, and -1 to maximize.
"""

from typing import Any

from kernels.prims import fma, nonnegative, signum, sqrt


def direction(p: Any, g: Any, wd: Any, sign: Any) -> Any:
    """Returns sign*g + wd*p. Without decay p is not touched, for 0*inf would be NaN."""
    g = sign * g
    return fma(wd, p, g) if wd != 0 else g


def shrunk(p: Any, decay: Any) -> Any:
    """Returns p + decay*p, rounded once where p*(1 + decay) would round twice; p if decay is 0."""
    return fma(decay, p, p) if decay != 0 else p


def clamp(g: Any, limit: Any) -> Any:
    """Returns g within -limit and limit; the loops call it before a rule, to clip by value."""
    if g > limit:
        return limit
    return -limit if g < -limit else g


def sgd(p: Any, g: Any, c: Any) -> Any:
    """Takes p -= lr*g (Robbins & Monro 1951)."""
    neg_lr, wd, sign = c
    return (fma(neg_lr, direction(p, g, wd, sign), p),)


def sgd_momentum(p: Any, g: Any, b: Any, c: Any) -> Any:
    """Takes b = mu*b + (1-dampening)*g; p -= lr*b (Polyak 1964, in torch's form)."""
    neg_lr, mu, damped, wd, sign = c
    b = fma(mu, b, damped * direction(p, g, wd, sign))
    return fma(neg_lr, b, p), b


def sgd_nesterov(p: Any, g: Any, b: Any, c: Any) -> Any:
    """Takes b = mu*b + g; p -= lr*(g + mu*b) (Sutskever et al. 2013, in torch's form)."""
    neg_lr, mu, damped, wd, sign = c
    g = direction(p, g, wd, sign)
    b = fma(mu, b, damped * g)
    return fma(neg_lr, fma(mu, b, g), p), b


def momentum(p: Any, g: Any, m: Any, c: Any) -> Any:
    """Takes m = beta*m + (1-beta)*g; p -= lr*m: an exponential average, m0 = 0."""
    neg_lr, beta, rest, wd, sign = c
    m = fma(beta, m, rest * direction(p, g, wd, sign))
    return fma(neg_lr, m, p), m


def adagrad(p: Any, g: Any, s: Any, c: Any) -> Any:
    """Takes s += g*g; p -= lr*g/(sqrt(s) + eps) (Duchi et al. 2011)."""
    neg_lr, eps, wd, sign = c
    g = direction(p, g, wd, sign)
    s = fma(g, g, s)
    return fma(neg_lr, g / (sqrt(s) + eps), p), s


def rmsprop(p: Any, g: Any, v: Any, c: Any) -> Any:
    """Takes v = alpha*v + (1-alpha)*g*g; p -= lr*g/root(v) (Tieleman & Hinton 2012)."""
    neg_lr, alpha, rest, inside, outside, _mu, wd, sign = c
    g = direction(p, g, wd, sign)
    v = fma(alpha, v, rest * g * g)
    return fma(neg_lr, g / (sqrt(v + inside) + outside), p), v


def rmsprop_momentum(p: Any, g: Any, v: Any, b: Any, c: Any) -> Any:
    """`rmsprop` whose quotients are gathered: b = mu*b + g/root(v); p -= lr*b."""
    neg_lr, alpha, rest, inside, outside, mu, wd, sign = c
    g = direction(p, g, wd, sign)
    v = fma(alpha, v, rest * g * g)
    b = fma(mu, b, g / (sqrt(v + inside) + outside))
    return fma(neg_lr, b, p), v, b


def rmsprop_centered(p: Any, g: Any, v: Any, a: Any, c: Any) -> Any:
    """`rmsprop` by the variance v - a*a, a the average gradient (Graves 2013); never below 0."""
    neg_lr, alpha, rest, inside, outside, _mu, wd, sign = c
    g = direction(p, g, wd, sign)
    v = fma(alpha, v, rest * g * g)
    a = fma(alpha, a, rest * g)
    variance = nonnegative(fma(-a, a, v))
    return fma(neg_lr, g / (sqrt(variance + inside) + outside), p), v, a


def rmsprop_centered_momentum(p: Any, g: Any, v: Any, b: Any, a: Any, c: Any) -> Any:
    """`rmsprop_centered` whose quotients are gathered: b = mu*b + g/root(v - a*a); p -= lr*b."""
    neg_lr, alpha, rest, inside, outside, mu, wd, sign = c
    g = direction(p, g, wd, sign)
    v = fma(alpha, v, rest * g * g)
    a = fma(alpha, a, rest * g)
    variance = nonnegative(fma(-a, a, v))
    b = fma(mu, b, g / (sqrt(variance + inside) + outside))
    return fma(neg_lr, b, p), v, b, a


def adadelta(p: Any, g: Any, v: Any, u: Any, c: Any) -> Any:
    """Takes d = g*sqrt(u+eps)/sqrt(v+eps); p -= lr*d (Zeiler 2012, Algorithm 1).

    v and u are the exponential averages of g*g and d*d.
    """
    neg_lr, rho, rest, eps, wd, sign = c
    g = direction(p, g, wd, sign)
    v = fma(rho, v, rest * g * g)
    d = sqrt(u + eps) / sqrt(v + eps) * g
    u = fma(rho, u, rest * d * d)
    return fma(neg_lr, d, p), v, u


def adam(p: Any, g: Any, m: Any, v: Any, c: Any) -> Any:
    """Takes p -= lr * m_hat/(sqrt(v_hat) + eps) (Kingma & Ba 2015, Algorithm 1).

    With ``decay`` = -lr*weight_decay it is AdamW (Loshchilov & Hutter 2019, Algorithm 2): p
    shrinks first.
    """
    neg_step, b1, rest1, b2, rest2, unbias, eps, decay, wd, sign = c
    g = direction(p, g, wd, sign)
    m = fma(b1, m, rest1 * g)
    v = fma(b2, v, rest2 * g * g)
    return fma(neg_step, m / fma(sqrt(v), unbias, eps), shrunk(p, decay)), m, v


def adam_amsgrad(p: Any, g: Any, m: Any, v: Any, w: Any, c: Any) -> Any:
    """`adam` that divides by the largest v so far (Reddi et al. 2018, Algorithm 2)."""
    neg_step, b1, rest1, b2, rest2, unbias, eps, decay, wd, sign = c
    g = direction(p, g, wd, sign)
    m = fma(b1, m, rest1 * g)
    v = fma(b2, v, rest2 * g * g)
    w = w if w >= v else v  # a NaN in v reaches w
    return fma(neg_step, m / fma(sqrt(w), unbias, eps), shrunk(p, decay)), m, v, w


def adamax(p: Any, g: Any, m: Any, u: Any, c: Any) -> Any:
    """Takes u = max(b2*u, |g| + eps); p -= lr * m_hat/u (Kingma & Ba 2015, Algorithm 2).

    eps is where torch adds it; the article has none.
    """
    neg_step, b1, rest1, b2, eps, wd, sign = c
    g = direction(p, g, wd, sign)
    m = fma(b1, m, rest1 * g)
    faded, seen = b2 * u, abs(g) + eps
    u = faded if faded >= seen else seen  # a NaN in g reaches u
    return fma(neg_step, m / u, p), m, u


def nadam(p: Any, g: Any, m: Any, v: Any, c: Any) -> Any:
    """Takes p -= a * (g + ahead*m)/(sqrt(v_hat) + eps) (Dozat 2016, in torch's form).

    a = lr*(1 - mu_t)/(1 - mu_1*...*mu_t) takes the gradient, a*ahead the average as it will count
    in the next step.
    """
    neg_step, ahead, b1, rest1, b2, rest2, unbias, eps, decay, wd, sign = c
    g = direction(p, g, wd, sign)
    m = fma(b1, m, rest1 * g)
    v = fma(b2, v, rest2 * g * g)
    move = fma(ahead, m, g) / fma(sqrt(v), unbias, eps)
    return fma(neg_step, move, shrunk(p, decay)), m, v


def radam(p: Any, g: Any, m: Any, v: Any, c: Any) -> Any:
    """Takes p -= lr * m_hat/(slope*sqrt(v) + base) (Liu et al. 2020, Algorithm 2, as torch).

    While the variance of v is intractable, slope is 0 and base 1; later slope holds the bias
    correction and the rectification, and base is slope*eps.
    """
    neg_step, b1, rest1, b2, rest2, slope, base, decay, wd, sign = c
    g = direction(p, g, wd, sign)
    m = fma(b1, m, rest1 * g)
    v = fma(b2, v, rest2 * g * g)
    root = fma(slope, sqrt(v), base) if slope != 0 else base  # 0*inf would be NaN
    return fma(neg_step, m / root, shrunk(p, decay)), m, v


def asgd(p: Any, g: Any, a: Any, c: Any) -> Any:
    """Takes p -= eta*(lambd*p + g); a += mu*(p - a) (Polyak & Juditsky 1992, in torch's form).

    ``decay`` is -eta*lambd; with ``copy`` (mu is 1) a is p itself.
    """
    neg_eta, decay, mu, copy, wd, sign = c
    less = shrunk(p, decay)
    less = less if less == less else p  # an infinite p stays, for lambd is above 0 by default
    p = fma(neg_eta, direction(p, g, wd, sign), less)
    return p, p if copy != 0 else fma(mu, p - a, a)


def rprop(p: Any, g: Any, last: Any, s: Any, c: Any) -> Any:
    """Takes p -= sign(g)*s; s grows while g keeps its sign (Riedmiller & Braun 1993).

    Where the sign turns, s shrinks and g counts as 0 there and in the next comparison (Igel &
    Hüsken 2000, iRprop-, which is torch's).
    """
    shrink, grow, low, high, zero, wd, sign = c
    g = direction(p, g, wd, sign)
    along = g * last
    s = s * grow if along > 0 else (s * shrink if along < 0 else s)
    s = low if s < low else s
    s = high if s > high else s
    g = zero if along < 0 else g
    return fma(-signum(g), s, p), g, s


def lion(p: Any, g: Any, m: Any, c: Any) -> Any:
    """Takes p -= lr*(sign(b1*m + (1-b1)*g) + weight_decay*p) (Chen et al. 2023, Algorithm 2).

    m = b2*m + (1-b2)*g follows; ``decay`` is -lr*weight_decay.
    """
    neg_lr, b1, rest1, b2, rest2, decay, wd, sign = c
    g = direction(p, g, wd, sign)
    move = signum(fma(b1, m, rest1 * g))
    return fma(neg_lr, move, shrunk(p, decay)), fma(b2, m, rest2 * g)


def yogi(p: Any, g: Any, m: Any, v: Any, c: Any) -> Any:
    """Takes v -= (1-b2)*sign(v - g*g)*g*g; p -= lr*m/(sqrt(v) + eps) (Zaheer et al. 2018, Alg. 2).

    The sign is exact: v - g*g is rounded once.
    """
    neg_step, b1, rest1, rest2, unbias, eps, wd, sign = c
    g = direction(p, g, wd, sign)
    m = fma(b1, m, rest1 * g)
    v = fma(-signum(fma(-g, g, v)) * rest2 * g, g, v)
    return fma(neg_step, m / fma(sqrt(v), unbias, eps), p), m, v


VARIANTS = {
    rule.__name__: rule
    for rule in (
        sgd, sgd_momentum, sgd_nesterov, momentum, adagrad, rmsprop, rmsprop_momentum,
        rmsprop_centered, rmsprop_centered_momentum, adadelta, adam, adam_amsgrad, adamax, nadam,
        radam, asgd, rprop, lion, yogi,
    )
}  # fmt: skip
"""Every scalar function by name."""
