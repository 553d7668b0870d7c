"""The programs of docs/integrations, and torch's optimizer to run them with instead."""

import re
from pathlib import Path

import torch

from gradpost.torch.names import listed

ROOT = Path(__file__).parents[2]
HERE = "http://127.0.0.1:8000"
IMPORT = "from gradpost.torch import RemoteOptimizer\n"
CLOSE = 3e-6
"""Of two runs in float32: the server fuses each product that is added, torch not every one."""


class Local(torch.optim.AdamW):
    """torch's own, called as `RemoteOptimizer` is: what a run on the server has to equal."""

    def __init__(self, params, url, id=None, *, rule, **hyper):
        assert rule == "adamw"
        super().__init__(listed(params), **hyper)


def program(page, name, url):
    """The Python block after `<!-- name: ... -->` in a page, for a server elsewhere."""
    text = (ROOT / "docs" / "integrations" / f"{page}.md").read_text()
    (code,) = re.findall(rf"<!-- {name}:[^>]*-->\n```python\n(.*?)```", text, re.S)
    return code.replace(HERE, url)


def run(code, optimizer, **names):
    """Runs a program with an optimizer of this class; returns what it has defined."""
    assert IMPORT in code
    found = {"RemoteOptimizer": optimizer, "__name__": "page", **names}
    exec(compile(code.replace(IMPORT, ""), "page", "exec"), found)
    return found


def apart(ours, theirs):
    """The largest difference of two models' parameters, relative to each tensor's largest."""
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    return max(
        (mine - other).abs().max().item() / other.abs().max().item() for mine, other in pairs
    )


def moved(model, start):
    """Whether training has changed every parameter: equality of models at rest proves nothing."""
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    return all(bool((mine - other).abs().max() > 1e-3) for mine, other in pairs)
