"""docs/optimizers.md: a section for every rule, with all its options, their defaults, its state."""

import json
import math
import re
from pathlib import Path

import pytest

from kernels.registry import RULES
from service.hyper import BY_NAME
from service.schemas import parse_spec

TEXT = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## )", TEXT, re.M | re.S))
ROWS = {
    name: (state, sizes)
    for names, state, sizes in re.findall(r"^\| (`.*?`) \| (.*?) \| ([\d;to ]+) \|$", TEXT, re.M)
    for name in re.findall(r"`(\w+)`", names)
}
OPTION = re.compile(r"`(\w+)` (\[[^]]*\]|true|false|\"\w+\"|-?\d[\d.e-]*)(?<!\.)")


def model(rule, **stated):
    return parse_spec({"optimizer": {"rule": rule, **stated}})[0].optimizer.model_dump(mode="json")


def test_every_rule_has_a_section_and_a_row():
    assert SECTIONS.keys() == ROWS.keys() == BY_NAME.keys()


@pytest.mark.parametrize("rule", BY_NAME)
def test_the_options_are_those_of_the_rule(rule):
    (listed,) = re.findall(r"^(?:.* )?Options: (.*?)\n\n", SECTIONS[rule], re.M | re.S)
    told = {}
    for name, value in OPTION.findall(listed):
        told.setdefault(name, json.loads(value))
    fields = {name: value for name, value in model(rule).items() if name not in ("rule", "preset")}
    assert told == fields


@pytest.mark.parametrize("rule", BY_NAME)
def test_the_row_names_all_state(rule):
    state, sizes = ROWS[rule]
    most = {"momentum": 0.9, "centered": True, "amsgrad": True}
    stated = {name: most[name] for name in most if name in BY_NAME[rule].model_fields}
    entry = RULES[rule]
    for hyper in (model(rule), model(rule, **stated)):
        slots = [slot.name for slot in entry.slots(hyper)]
        assert set(slots) <= set(re.findall(r"`(\w+)`", state))
        for shape in ((5,), (1 << 20, 1 << 20)):
            kept = [slot.shape(shape) for slot in entry.slots(hyper)]
            elements = sum(math.prod(one) for one in kept if one is not None)
            per_parameter = round(4 * elements / math.prod(shape))
            assert per_parameter in {int(size) for size in re.findall(r"\d+", sizes)}
    assert {*slots, *entry.scalars} == set(re.findall(r"`(\w+)`", state))
