"""What is compiled before ready: every loop that a session can need, and not past a stop."""

import itertools
import math
import threading

import numpy as np
import pytest

from gradpost.protocol.dtypes import NUMPY
from kernels import convert, cpu, passes, reduce, rows, rules, tensorwise
from kernels.registry import RULES
from service import warm
from service.hyper import BY_NAME
from service.warm import combinations, conversions, variants


def chosen_by(rule):
    """The scalar functions that a rule's own switches choose, of those it has."""
    base = BY_NAME[rule](rule=rule).model_dump()
    switches = {name: (False, True) for name, value in base.items() if isinstance(value, bool)}
    if "momentum" in base:
        switches["momentum"] = (0.0, 0.9)
    for values in itertools.product(*switches.values()):
        yield RULES[rule].variant({**base, **dict(zip(switches, values, strict=True))})


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.tensorwise])
def test_the_table_has_what_a_rule_chooses_and_no_more(rule):
    assert set(variants(rule)) == set(chosen_by(rule))


def test_every_scalar_function_belongs_to_a_rule():
    assert set(itertools.chain(*map(variants, RULES))) == set(rules.VARIANTS)


def test_combinations_have_no_gradient_wider_than_the_master_and_none_twice():
    found = combinations(["adam", "adamw"])
    assert ("F32", "F64") not in {(master, gradient) for _, master, gradient in found}
    assert len(found) == len(set(found)) == len(variants("adam")) * 7


def test_conversions_are_those_of_uploads_and_pulls():
    narrow = {("F32", other) for other in ("F64", "F16", "BF16")}
    assert set(conversions(["F32"])) == narrow | {(b, a) for a, b in narrow}
    assert len(conversions(["F32", "F64"])) == len(set(conversions(["F32", "F64"]))) == 10


@pytest.fixture
def cold(monkeypatch):
    """As after a start: nothing is loaded into the process."""
    for module in (reduce, convert, passes):
        monkeypatch.setattr(module, "_loops", {})
    monkeypatch.setattr(cpu, "_kernels", {})
    monkeypatch.setattr(rows, "_kernels", {})


@pytest.mark.usefixtures("cold")
def test_after_it_nothing_is_left_to_compile():
    assert warm.warm(["sgd"], ["F32"]) == 3 * 3 + 1 + 3 + 6
    assert rows.ready("sgd", "F32")
    for gradient in ("F32", "F16", "BF16"):
        assert all(cpu.ready(variant, "F32", gradient) for variant in variants("sgd"))
        assert reduce.ready(gradient)
    assert set(convert._loops) == set(conversions(["F32"]))


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("rule", tensorwise.FUNCTIONS)
def test_after_it_nothing_is_left_to_compile_of_a_rule_per_tensor(rule):
    assert not variants(rule)
    assert warm.warm([rule], ["F32"]) == 3 + 6 + 1
    loaded = [set(module._loops) for module in (reduce, convert, passes)]
    for gradient in ("F32", "F16", "BF16"):
        for shape in ((4, 3), (300, 200)) if RULES[rule].dims else ((3,), (4, 3), (300, 200)):
            optimizer = BY_NAME[rule](rule=rule, weight_decay=0.1)
            switches = {"nesterov": True} if hasattr(optimizer, "nesterov") else {}
            hyper = optimizer.model_copy(update=switches).model_dump()
            size = math.prod(shape)
            slots = [slot.shape(shape) for slot in RULES[rule].slots(hyper)]
            state = tuple(np.zeros(math.prod(s), np.float32) for s in slots if s is not None)
            wire = np.zeros(size, NUMPY[gradient])
            g = tensorwise.gradient(wire, gradient, "F32", hyper, 0.5, 1.0)
            p = np.ones(size, np.float32)
            numbers = tensorwise.numbers(rule, hyper, 0)
            tensorwise.step(rule, p, p, g, state, shape, hyper, 0.1, numbers)
    assert loaded == [set(module._loops) for module in (reduce, convert, passes)]


@pytest.mark.usefixtures("cold")
def test_once_a_stop_is_asked_for_no_further_loop_is_begun(monkeypatch):
    stop, begun = threading.Event(), []

    def kernel(*names):
        begun.append(names)
        stop.set()

    monkeypatch.setattr(cpu, "kernel", kernel)
    assert warm.warm(["adam"], ["F32"], stop) == len(begun) == 1
    assert not reduce._loops
    assert not convert._loops
