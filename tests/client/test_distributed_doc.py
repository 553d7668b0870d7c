"""The code of docs/distributed.md runs, by two trainers at once, and its recipes are taken."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import gradpost
from gradpost import Session
from tests.client.test_sync import together

PAGE = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
COMMON, *TRAINERS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
RECIPES = [row[1] for row in re.finditer(r'`(rule="[^`]*)`', PAGE)]


@pytest.mark.parametrize("block", TRAINERS, ids=["async", "sync", "bounded", "local"])
def test_two_trainers(application, block):
    names = {}
    exec(compile(COMMON, "docs/distributed.md", "exec"), names)
    names["URL"] = application
    exec(compile(block, "docs/distributed.md", "exec"), names)
    found = together(lambda: names["trainer"]("a", 1), lambda: names["trainer"]("b", 2))
    for params in found:
        np.testing.assert_allclose(params["w"], [1, 2, 3, 4], atol=0.3)
    id = re.search(r"URL, (?:params, )?\"(\w+)\"", block)[1]
    with Session.attach(application, id, join=False) as last:
        last.delete()


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(application, recipe):
    call = ast.parse(f"dict({recipe})", mode="eval").body
    options = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
    params = {"w": np.zeros(3, np.float32)}
    with gradpost.LocalSteps(application, params, every=1, **options) as local:
        for _ in range(3):
            params["w"] += np.float32(0.5)
            assert local.step().applied
            assert (params["w"] > 0).all()  # towards end
        local.session.delete()


def test_there_are_as_many_recipes_as_the_page_promises():
    assert len(TRAINERS) == 4
    assert len(RECIPES) == 5
