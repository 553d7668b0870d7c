"""The code of docs/torch.md runs, in its order, and does what it says."""

import re
from pathlib import Path

import torch

from gradpost import Session
from gradpost.torch.rules import TORCH

PAGE = (Path(__file__).parents[2] / "docs" / "torch.md").read_text()


def test_the_code_of_the_page(server, monkeypatch, tmp_path, capsys):
    create = Session.create
    made = []

    def here(url, *arguments, **options):
        assert url == "http://host:8000"
        made.append(create(server, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(Session, "create", here)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names = {}
    for block in blocks:
        exec(compile(block, "docs/torch.md", "exec"), names)
        if names["opt"].summary is not None:
            names.setdefault("first", names["loss"].item())
    assert names["first"] < 1.0
    assert capsys.readouterr().out.split()[0] == "101"
    assert names["loss"].item() < 1.0  # after the local steps
    assert len(blocks) == 4
    for session in made:
        Session(server, session.id).delete()


def test_the_table_names_every_rule():
    for rule, kind in TORCH.items():
        assert f"`{kind.__name__}` | `{rule}`" in PAGE
