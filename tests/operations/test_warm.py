import pytest

from kernels.registry import RULES
from service.warm import combinations, variants


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_its_variants(rule):
    assert variants(rule)


def test_options_that_choose_another_function_are_found():
    assert len(variants("adam")) >= 2


def test_combinations_have_no_gradient_wider_than_the_master():
    found = combinations(["adam"])
    assert ("F32", "F64") not in {(master, gradient) for _, master, gradient in found}
    assert len(found) == len(variants("adam")) * 7
    assert len(set(found)) == len(found)
