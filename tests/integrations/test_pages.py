"""The pages of docs/integrations, beside what these tests run of them."""

import re
from pathlib import Path

from tests.integrations.pages import IMPORT, ROOT, program


def test_every_program_is_run():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    found = 0
    for page in (ROOT / "docs" / "integrations").glob("*.md"):
        text = page.read_text()
        names = re.findall(r"<!-- (\w+): a test runs this", text)
        assert len(names) == text.count("```python"), page
        for name in names:
            assert f'"{name}"' in tests, (page, name)
            assert IMPORT in program(page.stem, name, "")
            found += 1
    assert found
